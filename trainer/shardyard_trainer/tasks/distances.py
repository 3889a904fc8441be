"""How far a student's outputs are from its teacher's, for each unit of the loss (Hinton et al., 2015).

Divergences are multiplied by the square of the temperature, so that their gradients are as large as those of the labels
at any temperature.
Shape suffixes: N units (samples or tokens), C outputs.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def of_classes(student_NC: torch.Tensor, teacher_NC: torch.Tensor, temperature: float) -> torch.Tensor:
    """The divergence [N] from the teacher's probabilities to the student's, of one class out of C; fp32.

    Vocabularies are padded to different sizes. What only the teacher has is left out; what only the student has is
    impossible to the teacher, so the student pays for what it gives to that.
    """
    shared = min(student_NC.shape[1], teacher_NC.shape[1])
    teacher_NC = (teacher_NC[:, :shared] / temperature).log_softmax(-1)
    student_NC = (student_NC / temperature).log_softmax(-1)[:, :shared]
    return (teacher_NC.exp() * (teacher_NC - student_NC)).sum(-1) * temperature**2


def of_several_classes(student_NC: torch.Tensor, teacher_NC: torch.Tensor, temperature: float) -> torch.Tensor:
    """The same where each class is true or false by itself: the mean over the classes."""
    teacher_NC, student_NC = teacher_NC / temperature, student_NC / temperature
    found = [
        F.logsigmoid(side * teacher_NC).exp() * (F.logsigmoid(side * teacher_NC) - F.logsigmoid(side * student_NC))
        for side in (1, -1)
    ]
    return (found[0] + found[1]).mean(-1) * temperature**2


def of_numbers(student_NC: torch.Tensor, teacher_NC: torch.Tensor, _temperature: float) -> torch.Tensor:
    """The squared difference [N] of numbers, which no temperature makes softer."""
    return (student_NC - teacher_NC).square().sum(-1)
