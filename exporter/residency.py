"""How much of a program its accelerator computes: counted while a format is written, reported in the bundle.

A multiplication of matrices that is left to a CPU's portable kernels takes longer than all the rest together, so
`require_resident` refuses a program with one.
"""

from collections import Counter
from collections.abc import Mapping

from exporter.errors import GateFailed
from runtimes.bundle import Residency

HEAVY = frozenset({"addmm", "baddbmm", "bmm", "convolution", "einsum", "linear", "matmul", "mm"})


class Tally:
    """Counts operations by where they run.

    >>> tally = Tally()
    >>> tally.add("aten::linear", on=True, macs=64, weight_bytes=256)
    >>> tally.add("aten::slice_copy", on=False)
    >>> tally.residency("xnnpack").elsewhere
    ('aten::slice_copy',)
    """

    def __init__(self) -> None:
        self._elsewhere: Counter[str] = Counter()
        self._all, self._on = Counter[str](), Counter[str]()

    def add(self, op: str, on: bool, macs: int = 0, weight_bytes: int = 0) -> None:
        """Count one operation, named namespace::name, and whether it is `on` the accelerator.

        `macs`: multiplications of two numbers for one token; `weight_bytes`: of the weights stored for it.
        """
        figures = {"ops": 1, "macs": macs, "weight_bytes": weight_bytes}
        self._all.update(figures)
        if on:
            self._on.update(figures)
        else:
            self._elsewhere[op] += 1

    def residency(self, accelerator: str) -> Residency:
        """What was counted; op types elsewhere come in order of their names."""
        names = sorted(self._elsewhere)
        return Residency(
            accelerator=accelerator,
            ops=self._all["ops"],
            ops_on=self._on["ops"],
            elsewhere=tuple(names),
            elsewhere_ops=tuple(self._elsewhere[name] for name in names),
            macs=self._all["macs"],
            macs_on=self._on["macs"],
            weight_bytes=self._all["weight_bytes"],
            weight_bytes_on=self._on["weight_bytes"],
        )


def heavy_elsewhere(residency: Residency) -> dict[str, int]:
    """Op types outside of the accelerator that multiply matrices on portable kernels, and how many of each."""
    counts: Mapping[str, int] = dict(zip(residency.elsewhere, residency.elsewhere_ops, strict=True))
    return {op: count for op, count in counts.items() if op.rpartition("::")[2] in HEAVY}


def require_resident(residency: Residency) -> None:
    """GateFailed if a heavy op runs outside of the accelerator."""
    if heavy := heavy_elsewhere(residency):
        found = ", ".join(f"{count} {op}" for op, count in heavy.items())
        raise GateFailed(
            f"{residency.accelerator} leaves {found} to portable kernels, which are many times slower: "
            "choose a scheme or a backend that takes them"
        )
