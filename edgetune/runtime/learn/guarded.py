"""What every way of learning on the device shares: a store, the guard before it, and the way back.

Nothing that is given changes an answer before `commit`, and `commit` changes it only where the
guard finds nothing against the candidate.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgetune.errors import ConfigError, DataError
from edgetune.runtime.bundle import Bundle
from edgetune.runtime.learn.guard import Evidence, PairedTest, Rules, Verdict, judge
from edgetune.runtime.learn.material import Material
from edgetune.runtime.learn.state import (
    STATE_NAME,
    State,
    binding_of,
    default_store,
    dump_state,
    read_state,
)
from edgetune.runtime.learn.store import Generation, Store
from edgetune.runtime.records import to_mapping

if TYPE_CHECKING:
    from edgetune.runtime.model import EdgeModel

Shares = tuple[float, float]

# one of so many samples of a class is kept apart, to judge by, from the fifth on
HOLDOUT_SHARE = 5
# generations that undo can go back through
KEPT_GENERATIONS = 5
# classes a device may have in all: a head is as wide
MAX_CLASSES = 10_000
MAX_LABEL_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class SetAside:
    """A sample that was not taken, and why. `place` is its index in what was given."""

    place: int
    id: str
    label: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a commit decided, and on what grounds.

    accepted: whether the candidate answers from now on. generation: which one is live. labels: of
    the candidate. counts: label -> samples that this device learned of it. canary, holdout: share
    that the live state and the candidate get right; None without samples. bytes_written, syncs:
    what it cost the disk.
    """

    accepted: bool
    generation: int
    reasons: tuple[str, ...]
    tests: tuple[PairedTest, ...]
    labels: tuple[str, ...]
    counts: dict[str, int]
    canary: Shares | None
    holdout: Shares | None
    bytes_written: int
    syncs: int


class Guarded(ABC):
    """Teaches one model. Not for several threads at once.

    As a context manager it gives its folder free at the end.
    """

    # what a store's receipts call this way of learning
    KIND: ClassVar[str]

    def __init__(self, model: "EdgeModel", store: Store, rules: Rules) -> None:
        """Take an open store of this kind."""
        self._model, self._store, self._rules = model, store, rules
        self._live: State | None = None

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *failure: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Give the store free."""
        self._store.close()

    @property
    def folder(self) -> Path:
        """The store's folder."""
        return self._store.folder

    @abstractmethod
    def candidate(self) -> State:
        """Return the state that the next commit would put in place."""

    def judge(self, candidate: State) -> tuple[Verdict, dict[str, Shares | None]]:
        """Hold a candidate against the live state.

        Returns:
            The verdict, and the shares of right answers of both on the canary and the holdout.
        """
        canary, holdout = self._canary(candidate), self._holdout(candidate)
        verdict = judge(canary, holdout, self._rules, candidate.labels)
        return verdict, {"canary": _shares(canary), "holdout": _shares(holdout)}

    def undo(self) -> int:
        """Go back to what answered before the last commit; return that generation, 0 the factory's.

        What a learner was given since the last commit stays given; what a trainer fitted since then
        is dropped.

        Raises:
            ConfigError: the factory state answers already, or its parent is no longer kept.
        """
        live = self._store.undo()
        self._take_up()
        return 0 if live is None else live.number

    def factory_reset(self, *, forget: bool = False) -> None:
        """Answer as the bundle came.

        Args:
            forget: remove everything that was learned from the disk too.
        """
        self._store.factory_reset(forget=forget)
        self._take_up()

    def history(self) -> tuple[Generation, ...]:
        """Return the generations that are kept, newest first, with their receipts."""
        return self._store.history()

    @abstractmethod
    def _canary(self, candidate: State) -> Evidence | None:
        """Return what the states answer on the bundle's canary."""

    @abstractmethod
    def _holdout(self, candidate: State) -> Evidence | None:
        """Return what the states answer on the device's own samples."""

    @abstractmethod
    def _rebuild(self) -> None:
        """Make ready to learn on from the live state."""

    @abstractmethod
    def _drop(self, reasons: Sequence[str]) -> None:
        """Drop what was given since the last commit."""

    def _take_up(self) -> None:
        """Take up what the store holds, and have the model answer with its live state."""
        live = self._store.live
        self._live = None if live is None else read_state(self._model.bundle, self._store, live)
        self._rebuild()
        self._model.use(self._live)

    def _settle(
        self,
        candidate: State,
        counts: dict[str, int],
        *,
        files: Mapping[str, bytes],
        grounds: Mapping[str, Any],
    ) -> Receipt:
        """Put a candidate in place if the guard finds nothing against it, and drop it else.

        Args:
            candidate: what to judge.
            counts: label -> samples that this device learned of it.
            files: what a generation keeps besides the state.
            grounds: what its receipt says besides.
        """
        disk = self._store.disk
        written, syncs = disk.bytes_written, disk.syncs
        verdict, shares = self.judge(candidate)
        if verdict.accepted:
            generation = self._store.commit(
                {STATE_NAME: dump_state(candidate), **files},
                {
                    "kind": self.KIND,
                    "accepted": True,
                    "reasons": list(verdict.reasons),
                    "tests": [to_mapping(test) for test in verdict.tests],
                    "counts": counts,
                    **shares,
                    **grounds,
                },
            )
            self._store.prune(KEPT_GENERATIONS)
            self._live = replace(candidate, generation=generation.number)
            self._rebuild()
            self._model.use(self._live)
        else:
            self._drop(verdict.reasons)
        live = self._store.live
        return Receipt(
            accepted=verdict.accepted,
            generation=0 if live is None else live.number,
            reasons=verdict.reasons,
            tests=verdict.tests,
            labels=candidate.labels,
            counts=counts,
            canary=shares["canary"],
            holdout=shares["holdout"],
            bytes_written=disk.bytes_written - written,
            syncs=disk.syncs - syncs,
        )


def open_store(bundle: Bundle, folder: str | Path | None, kind: str) -> Store:
    """Open the store in `folder`, or the one beside the bundle, for learning of a kind.

    Raises:
        ConfigError: it is another bundle's, or holds what was learned in another way.
        IntegrityError: it is damaged.
        ResourceError: another process learns there, or the disk fails.
    """
    path = default_store(bundle) if folder is None else Path(folder)
    store = Store.open(path, binding=binding_of(bundle))
    try:
        check_kind(store, kind)
    except BaseException:
        store.close()
        raise
    return store


def default_rules(material: Material) -> Rules:
    """Return rules that ask no more than the bundle's canary can prove."""
    return Rules(margin=material.margin, factory_margin=max(0.05, material.margin))


def is_held_out(number: int) -> bool:
    """Say whether a class's sample of this number, from 1 on, is kept apart to judge by."""
    return number % HOLDOUT_SHARE == 0


def check_samples(
    samples: Sequence[Any], labels: Sequence[str] | str, known: Sequence[str]
) -> list[str]:
    """Return a label for each sample.

    Args:
        samples: raw ones.
        labels: one a sample, or one for all.
        known: labels that there are already.

    Raises:
        DataError: the numbers differ, a label is none, or they are too many.
    """
    if isinstance(samples, str | bytes):
        raise DataError("samples: expected several, in a list; got one")
    names = [labels] * len(samples) if isinstance(labels, str) else list(labels)
    if len(names) != len(samples):
        raise DataError(f"expected a label for each of {len(samples)} samples, got {len(names)}")
    for name in names:
        check_label(name)
    if len({*names, *known}) > MAX_CLASSES:
        raise DataError(f"labels: more than {MAX_CLASSES} classes")
    return names


def check_kind(store: Store, kind: str) -> None:
    """Refuse a store whose live state another way of learning made.

    Raises:
        ConfigError: it is of the other kind.
    """
    live = store.live
    found = None if live is None else live.receipt.get("kind")
    if found is not None and found != kind:
        raise ConfigError(
            f"{store.folder}: holds what was learned as {found!r}, which {kind!r} cannot go on"
            " from; name another folder, or reset this one (edgetune-rt learn BUNDLE --reset)"
        )


def check_label(label: str) -> None:
    """Refuse a label that no result could show.

    Raises:
        DataError: it is empty, too long, or no printable text.
    """
    if not isinstance(label, str) or not label.strip() or len(label) > MAX_LABEL_CHARACTERS:
        raise DataError(
            f"label {label!r:.80}: expected a text of 1 to {MAX_LABEL_CHARACTERS} characters"
        )
    if not label.isprintable():
        raise DataError(f"label {label!r:.80}: has characters that cannot be shown")


def _shares(evidence: Evidence | None) -> Shares | None:
    """Return the shares of samples that the live state and the candidate get right."""
    if evidence is None:
        return None
    return (
        float((evidence.before == evidence.truth).mean()),
        float((evidence.after == evidence.truth).mean()),
    )
