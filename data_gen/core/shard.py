"""One worker's share of the work: said as I/N, or by whoever started the processes. No process waits for another."""

import os
import re
from dataclasses import dataclass
from typing import Self

from data_gen.core.errors import InputError

STARTERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
"""Variables that torchrun, and srun for each task of a step, set: number, how many, number on this machine."""
REMEDY = "let torchrun or srun set both, unset both, or give --shard I/N"


@dataclass(frozen=True)
class Shard:
    """Items number index, index + count, ...; local: number of this process on its machine, which chooses a GPU.

    Where nobody says `local`, index does: shards that share a machine have a GPU each.
    """

    index: int = 0
    count: int = 1
    local: int | None = None

    @classmethod
    def of(cls, text: str | None) -> Self:
        """`text` as I/N, 0 <= I < N; without it what torchrun or srun says, else all. Raises InputError."""
        if text is None:
            if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
                raise InputError(f"WORLD_SIZE is not set, but RANK is; {REMEDY}")
            return next((cls._started(*names) for names in STARTERS if {*names[:2]} <= os.environ.keys()), cls())
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None or int(found[1]) >= int(found[2]):
            raise InputError(f"--shard {text}: give I/N with I from 0 to N - 1")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def _started(cls, index: str, count: str, local: str) -> Self:
        """What variables of these names say, of which the last one may be missing. Raises InputError, naming one."""
        said = {name: os.environ[name] for name in (index, count, local) if name in os.environ}
        if wrong := next((name for name, value in said.items() if not re.fullmatch(r"\d{1,6}", value)), None):
            raise InputError(f"{wrong}={said[wrong]}: not a whole number of at most six digits; {REMEDY}")
        numbers = {name: int(value) for name, value in said.items()}
        if numbers[index] >= numbers[count]:
            raise InputError(f"{index}={said[index]}: not below {count}={said[count]}; {REMEDY}")
        return cls(numbers[index], numbers[count], numbers.get(local))

    def owns(self, number: int) -> bool:
        """Whether an item is this worker's; each is exactly one worker's."""
        return number % self.count == self.index

    def use_own_gpu(self) -> None:
        """Make `cuda` mean this process's own GPU; nothing where there is none."""
        import torch  # `lookahead --help` does not wait for it

        if torch.cuda.is_available():
            own = self.index if self.local is None else self.local
            torch.cuda.set_device(own % torch.cuda.device_count())

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


ALL = Shard()
"""The only worker's."""
