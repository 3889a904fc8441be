"""Opens a model folder for answering: its model, its inputs, and its task's predictor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from shardyard_trainer.inputs.base import Inputs
from shardyard_trainer.inputs.image import ImageInputs
from shardyard_trainer.inputs.sequences import SequenceInputs
from shardyard_trainer.inputs.text import TextInputs
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import Folder, FolderInvalid
from shardyard_trainer.models.folder import TORCH_HUB_PICTURES, ModelFolder, read_folder
from shardyard_trainer.models.loaded import Loaded, load_model
from shardyard_trainer.models.weight_heads import with_true_head
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.base import Predictor, TrainingTask
from shardyard_trainer.tasks.picture_vectors import PictureVectors
from shardyard_trainer.tasks.vectors import TextVectors, Vectors

CLASSIFIER = "AutoModelForSequenceClassification"


@dataclass(frozen=True)
class Opened:
    """An opened folder. `predictor` is None for a bare backbone, which gives vectors only."""

    loaded: Loaded
    inputs: Inputs
    task: str
    predictor: Predictor | None

    @cached_property
    def vectors(self) -> Vectors:
        """What makes vectors with the model. Raises FolderInvalid TASK_MISMATCH for a modality that has none."""
        if isinstance(self.inputs, TextInputs):
            return TextVectors(self.loaded, self.inputs)
        if self.loaded.folder.model_type == TORCH_HUB_PICTURES:
            text = "this module of PyTorch Hub gives classes for pictures, and no vectors; use Predict"
            raise FolderInvalid(text, reason="TASK_MISMATCH")
        if isinstance(self.inputs, ImageInputs):
            return PictureVectors(self.loaded, self.inputs)
        kind = self.loaded.folder.model_type
        text = f"this {kind} reads neither texts nor pictures, so it has no vectors"
        raise FolderInvalid(text, reason="TASK_MISMATCH")


def open_model(source: Folder) -> Opened:
    """Loads a folder with its inputs, and its task's head if it has one. Raises FolderInvalid."""
    described = with_true_head(read_folder(source))
    task = table.of_folder(described)
    kind = inputs_of(described, task)
    inputs = kind.load(source, described)
    loaded = load_model(described, task.auto if task is not None else "")
    config = loaded.model.config
    complain = architectures.classifier_refusal if described.auto == CLASSIFIER else kind.refusal
    if refusal := complain(config):
        raise FolderInvalid(refusal, reason="TASK_MISMATCH")
    predictor = task.open(loaded, inputs) if task is not None else None
    return Opened(loaded, inputs, task.name if task is not None else "", predictor)


def inputs_of(described: ModelFolder, task: TrainingTask | None) -> type[Inputs]:
    """Loads the inputs of a folder: by its task, or by its architecture if it has no head."""
    if task is not None:
        return task.inputs
    if architectures.writes_texts(described.model_type):
        return SequenceInputs
    return ImageInputs if architectures.is_of_pictures(described.model_type) else TextInputs
