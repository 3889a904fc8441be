"""From a CSV file to a model and its answers: `python examples/from_csv_to_predictions.py MODEL_FOLDER reviews.csv`.

The file has the columns `review` and `sentiment`; MODEL_FOLDER is a Hugging Face folder, or `hub:owner/name`.
"""

import sys

import shardyard

with shardyard.Client() as client:
    job = client.submit(
        shardyard.TextClassification(),
        model=sys.argv[1],
        train_data=shardyard.Data(sys.argv[2], text="review", label="sentiment"),
        optimization=shardyard.Optimization(epochs=2, learning_rate=1e-4),
    )
    for event in job.watch():
        print(event)
    job.wait()
    for answer in job.model().predict(["Hello, my dog is cute", "What a waste of an evening"]):
        print(answer.label, answer.score)
