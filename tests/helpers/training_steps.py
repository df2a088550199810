"""What a training computes with, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import transformers


@contextmanager
def watched_steps(watch: Callable[[Any, dict[str, Any], Any], object]) -> Iterator[None]:
    """Show each step of the trainings inside: the model with its gradients, what it was given, and the loss."""
    step = transformers.Trainer.training_step

    def watched(self, model, inputs, items=None):
        loss = step(self, model, inputs, items)
        watch(model, inputs, loss)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", watched)
        yield
