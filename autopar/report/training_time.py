"""How long a complete training takes at an estimate's speed.

seconds = tokens / (tokens per second)        days = seconds / 86,400        GPU hours = seconds * GPUs / 3,600
"""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTime:
    """A training on ``tokens`` tokens: days on ``gpus`` GPUs, and the hours of all of them."""

    tokens: float
    gpus: int
    days: float
    gpu_hours: float

    @staticmethod
    def of(tokens: float, tokens_per_s: float, gpus: int) -> "TrainingTime":
        """The training on ``tokens`` tokens at ``tokens_per_s`` of all GPUs together.

        >>> TrainingTime.of(86_400, 2.0, 48)
        TrainingTime(tokens=86400, gpus=48, days=0.5, gpu_hours=576.0)
        """
        seconds = tokens / tokens_per_s
        return TrainingTime(tokens=tokens, gpus=gpus, days=seconds / 86400, gpu_hours=seconds * gpus / 3600)

    @property
    def text(self) -> str:
        """One line for people.

        >>> TrainingTime(tokens=15e12, gpus=16_000, days=65.89, gpu_hours=25_300_443).text
        '15,000,000,000,000 tokens: 66 days on 16,000 GPUs, 25,300,443 GPU hours'
        """
        days = f"{self.days:,.0f}" if self.days >= 10 else f"{self.days:.2g}"
        return f"{self.tokens:,.0f} tokens: {days} days on {self.gpus:,} GPUs, {self.gpu_hours:,.0f} GPU hours"

    def document(self) -> dict[str, float]:
        """What ``--json`` shows of it."""
        return asdict(self)
