"""What looks on while a model trains: when to keep it, how far it is, whether it is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.progress import Progress, TaskID
from transformers import TrainerCallback

if TYPE_CHECKING:
    from wda.training.keeping import KeepingTrainer


class KeepSteps(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint at the recipe's steps and at no other.

    The loss is logged there too, so that what is logged later does not depend on whether the
    training went on from here or was interrupted.
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps = set(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Ask for a checkpoint at a chosen step."""
        control.should_save = state.global_step in self.steps
        control.should_log |= control.should_save


class StopWhenLost(TrainerCallback):  # type: ignore[misc]
    """Ends a training whose loss is no number any more.

    On the processor it looks after every step. An accelerator would have to be waited for, so
    there it looks when the loss is logged, and before a checkpoint.
    """

    def __init__(self, trainer: KeepingTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Look at the loss."""
        if args.device.type == "cpu" or control.should_log:
            self.trainer.require_finite_losses()


class ShowProgress(TrainerCallback):  # type: ignore[misc]
    """Moves a progress bar of the training, with loss and learning rate, and one of the testing."""

    def __init__(self, bar: Progress, name: str, steps: int) -> None:
        self.bar = bar
        self.name = name
        self.training = bar.add_task(f"training {name}", total=steps, note="")
        self.testing: TaskID | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Show the step."""
        self.bar.update(self.training, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Show loss and learning rate."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            note = f"loss {float(logs['loss']):.3f}, rate {float(logs['learning_rate']):.1e}"
            self.bar.update(self.training, note=note)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Show the batch of the held-out texts."""
        if self.testing is None:
            batches = len(kwargs["eval_dataloader"])
            self.testing = self.bar.add_task(f"testing {self.name}", total=batches, note="")
        self.bar.advance(self.testing)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Take the bar of the testing away until the next one."""
        if self.testing is not None:
            self.bar.remove_task(self.testing)
            self.testing = None
