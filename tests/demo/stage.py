"""One resumable training stage: fixed steps, a checkpoint now and then, a log line."""

import logging
import math

import torch

log = logging.getLogger("demo")


def cosine(step, steps, peak, warmup):
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class Stage:
    """A network, its AdamW and the running average of its weights, kept in one file.

    Matrices decay by 0.01; ``ema`` 0 makes the average follow the weights. A stage whose file
    exists goes on from the step written there.
    """

    def __init__(self, path, net, betas, ema=0.0):
        matrices = [p for p in net.parameters() if p.ndim > 1]
        others = [p for p in net.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others}]
        self.optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=0.0, fused=True)
        self.path, self.net, self.ema, self.step = path, net, ema, 0
        self.average = {key: value.detach().clone() for key, value in net.state_dict().items()}
        if path.exists():
            state = torch.load(path, weights_only=True)
            net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step = state["average"], state["step"]

    def save(self):
        """Replace the file at once, so that a kill leaves the old or the new one."""
        parts = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        fresh = self.path.with_suffix(".new")
        torch.save(parts | {"average": self.average, "step": self.step}, fresh)
        fresh.replace(self.path)

    def update(self, loss, rate):
        """One optimiser step and its share in the average; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.ema, (1 + self.step) / (10 + self.step))
        average, values = list(self.average.values()), list(self.net.state_dict().values())
        torch._foreach_lerp_(average, values, 1 - decay)
        self.step += 1
        return loss.item()

    def run(self, loss_at, steps, rate, every, report):
        """Train to ``steps`` on ``loss_at(step)`` at ``rate(step)``; report at each checkpoint."""
        losses = []
        while self.step < steps:
            losses.append(self.update(loss_at(self.step), rate(self.step)))
            if self.step % every == 0 or self.step == steps:
                mean = sum(losses) / len(losses)
                log.info("%s %d/%d: loss %.4f", self.path.stem, self.step, steps, mean)
                losses = []
                self.save()
                report()
