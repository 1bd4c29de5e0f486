"""What turns a batch's outputs into results, whatever the samples are. One row a kind of label."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from edgetune.runtime.manifest import Manifest


class Answers(Protocol):
    """Outputs to results. `options` are the keys of the manifest's options that it reads."""

    options: frozenset[str]

    def __init__(self, manifest: Manifest, options: Mapping[str, Any]) -> None:
        """Read the options."""

    def results(
        self,
        outputs: Mapping[str, Any],
        labels: Sequence[str],
        *,
        all_scores: bool,
        learned: bool,
    ) -> list[Any]:
        """Return one result a sample; as of `DeviceTask.results`."""


def split_options(
    manifest: Manifest, answers: type[Answers]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the manifest's options that `answers` reads, and the others."""
    theirs = {k: v for k, v in manifest.options.items() if k in answers.options}
    return theirs, {k: v for k, v in manifest.options.items() if k not in theirs}
