"""What every training is to the loop around it: named groups, numbers of a step, a stop at what is not finite."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from neco.config import schema
from neco.distributed import collectives
from neco.model.backbone import Backbone, StochasticDepth
from neco.training import optim, strategies
from neco.utils.errors import NecoError


class Module(pl.LightningModule, ABC):
    """A training step whose randomness is a function of (seed, number of the batch), and its optimiser.

    Subclasses set `parts` and call `account` in each `training_step`. `shown` are the metrics for the terminal.

    Args:
        steps: optimiser steps of the whole run, over which the schedules go.
    """

    broken_at: Tensor  # the first steps at which loss and gradient were not finite, -1 for never
    shown: tuple[str, ...] = ("loss",)

    def __init__(self, *, options: schema.Trainings, optim: schema.Optim, steps: int, seed: int) -> None:
        super().__init__()
        self.options, self.optim_options, self.steps, self.seed = options, optim, steps, seed
        self.register_buffer("broken_at", torch.full((2,), -1), persistent=False)
        self.metrics: dict[str, Tensor] = {}
        self.step_metrics: dict[str, Tensor | float] = {}
        self.saved: dict[str, Any] = {}  # the run's own part of its checkpoints

    @abstractmethod
    def parts(self) -> tuple[Backbone, nn.Module, nn.Module]:
        """What trains at the backbone's rates, and two parts that train at the head's."""

    def draw(self, index: int, images: int) -> None:
        """Fix the random numbers of batch `index`, of which this process has `images`: for stochastic depth.

        They are those of the whole batch in every process: what an image meets does not depend on their number.
        """
        self.drawn = index
        self._draw(self.seed, index)
        if collectives.world() > 1:
            for part in self.modules():
                if isinstance(part, StochasticDepth):
                    part.split = collectives.world(), collectives.rank(), images

    def draw_own(self) -> None:
        """Fix the random numbers of this process from here on in the batch: for dropout, of each element alone."""
        if collectives.rank():
            self._draw(self.seed, self.drawn, collectives.rank())

    def _draw(self, *key: int) -> None:
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def account(self, loss: Tensor, extra: dict[str, Tensor] | None = None) -> Tensor:
        """Add a batch's numbers to those of the step; returns the loss."""
        for name, value in {"loss": loss.detach(), **(extra or {})}.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value / self.options.accumulate
        self.note_broken(0, loss)
        return loss

    def note_broken(self, place: int, value: Tensor) -> None:
        """Remember in `broken_at` the first step where it is not finite, without waiting for the device."""
        before = self.broken_at[place]
        step = torch.full_like(before, self.global_step + 1)
        self.broken_at[place] = torch.where((before < 0) & ~value.detach().isfinite(), step, before)

    def raise_if_broken(self, last: Path, saving: bool = False) -> None:
        """Raises NecoError if loss or gradient was not finite at some step or, before saving, if a weight isn't now."""
        found = [
            (step, what) for step, what in zip(self.broken_at.tolist(), ("loss", "gradient"), strict=True) if step >= 0
        ]
        if (
            saving
            and not found
            and not strategies.whole(torch.nn.utils.get_total_norm([*self.parameters()])).isfinite()
        ):
            named = [name for name, p in self.named_parameters() if not strategies.local([p])[0].isfinite().all()]
            found = [(self.global_step, f"a weight ({', '.join(named[:3]) or 'all are beyond 1e19'})")]
        if found:
            step, what = min(found, key=lambda pair: pair[0])
            saved = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint was saved before"
            raise NecoError(
                f"{what} is not a finite number at step {step}; {saved}. Lower optim.lr or {self.options.node}.clip."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["neco"] = self.saved

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The end of a shorter run: Lightning would take the longer one for finished.
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        # torch would take the groups' values from the checkpoint, and a changed optim.lr would do nothing.
        for group, ours in zip(checkpoint["optimizer_states"][0]["param_groups"], self.groups(), strict=True):
            group |= {"peak_lr": ours["peak_lr"], "betas": self.optim_options.betas}

    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups."""
        rates = self.optim_options.lr, self.optim_options.head_lr, self.optim_options.layer_decay
        return optim.parameter_groups(*self.parts(), *rates)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.groups(), betas=self.optim_options.betas, fused=self.device.type == "cuda")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Before clipping: the gradient's norm over everything that trains."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = strategies.whole(torch.nn.utils.get_total_norm(grads))
        self.note_broken(1, norm)
        self.metrics["grad_norm"] = norm

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """By torch: Lightning clips nothing in bfloat16 for a fused optimiser, as if its gradients were scaled."""
        if gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        step = self.global_step
        optim.schedule(optimizer, step, self.steps, self.optim_options.weight_decay, self.optim_options.power)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        rates: dict[str, float] = {}  # the highest of the backbone and of the head
        for group in optimizer.param_groups:
            name = f"lr_{group['name'].split('/')[0]}"
            rates[name] = max(rates.get(name, 0.0), group["lr"])
        decay = max(group["weight_decay"] for group in optimizer.param_groups)
        self.step_metrics = {**self.metrics, **rates, "weight_decay": decay}
        self.metrics = {}
