"""A plan as people read it: what a run would cost and what would be left."""

from __future__ import annotations

from html import escape

from cloister.wire import plans as wire
from cloister.wire.layers import Linear, is_frozen

__all__ = ["Plan"]


class Plan(wire.Plan):
    """A quoted run. `client.train(plan, model=...)` spends it; until then nothing is spent."""

    def __str__(self) -> str:
        spec, event, quote = self.training, self.event, self.quote
        layers = " - ".join(
            f"{layer.in_features}x{layer.out_features}" if isinstance(layer, Linear) else layer.type
            for layer in spec.architecture.layers
        )
        optimizer = f"{spec.optimizer.type}, learning rate {spec.optimizer.learning_rate:g}"
        verdict = f"fits, {quote.left:.3f} would be left" if quote.fits else f"does not fit: {quote.left:.3f} is left"
        if not quote.fits:
            verdict += "; ask for less, or for all that is left by DP(all_left=True)"
        count = 1 + len(spec.with_datasets)
        block = f" in block {quote.block}" if quote.block or count > 1 else ""
        together = f"{count} together, each charged to a block of its own: {spec.nominal_size} expected units"
        lines = {
            **({"datasets": together} if count > 1 else {}),
            "network": f"{layers}, {spec.architecture.loss}",
            **_start(spec),
            "steps": f"{spec.steps} of {spec.batch_size} expected rows (q = {event.sampling_rate:.4g}), {optimizer}",
            "noise": f"multiplier {spec.noise_multiplier:.4g} on gradients clipped to {spec.clip:g}",
            "cost": f"epsilon {self.epsilon:.3f} at delta {self.delta:g} (RDP, decides; PLD: {self.epsilon_pld:.3f})",
            "budget": f"{quote.before:.3f} -> {quote.after:.3f} of {quote.cap:g}{block}, {verdict}",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items()) + "\nA plan spends nothing."

    def __repr__(self) -> str:
        verdict = "fits" if self.quote.fits else "does not fit"
        return f"<Plan of {self.training.steps} steps, epsilon {self.epsilon:.3f} at delta {self.delta:g}, {verdict}>"

    def _repr_html_(self) -> str:
        picture = self.network.picture if self.network is not None else ""
        return f"<pre>{escape(str(self))}</pre>{picture}"


def _start(spec: wire.TrainingSpec) -> dict[str, str]:
    """What is not drawn at random and trained in full, where there is any."""
    told = []
    if spec.initial is not None:
        told.append(f"from uploaded weights {spec.initial.digest[:12]}...")
    frozen = sum(map(is_frozen, spec.architecture.layers))
    if frozen:
        told.append(
            f"{frozen} frozen layers" + ("" if spec.lora is None else f" with adapters of rank {spec.lora.rank}")
        )
    return {"start": ", ".join(told)} if told else {}
