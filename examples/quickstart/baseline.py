"""What to beat: a bag of words, the same labels."""

from __future__ import annotations

from pathlib import Path

from material import read
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline


def bag_of_words(train: Path, test: Path) -> float:
    """Accuracy on `test` of logistic regression on TF-IDF weights of words and pairs of words."""
    texts, labels = zip(*read(train), strict=True)
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), LogisticRegression(C=10, max_iter=1000)
    )
    model.fit(texts, labels)
    test_texts, test_labels = zip(*read(test), strict=True)
    return float(model.score(test_texts, test_labels))
