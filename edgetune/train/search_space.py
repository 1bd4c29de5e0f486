"""What a search may change: keys of the training config, each with a range or a list.

Optuna's names for the two are kept: a range has `low`, `high`, `log` and `step`, a list has
`choices`. optuna itself is imported only where a value is drawn.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args, get_origin, get_type_hints

from edgetune.config import ALIASES, LORA_METHODS, TrainConfig, read_toml
from edgetune.errors import ConfigError
from edgetune.runtime.records import from_mapping, nearest
from edgetune.tasks import task_kind
from edgetune.train.optim import learning_rate

if TYPE_CHECKING:
    from optuna.trial import Trial

# trials that differ in these could not be compared, or would not differ in what they learn
FIXED_KEYS = frozenset(
    {
        "task", "data", "val", "test", "output", "input_column", "label_column", "val_fraction",
        "min_per_class", "allow", "metric", "seed", "time_budget", "find_lr", "workers", "cpu",
        "checkpoint_minutes", "checkpoint_steps", "activation_cache", "cache_gib", "track",
    }
)  # fmt: skip
# combinations of ends and choices that are tried as a config before anything runs
MOST_COMBINATIONS = 4096
# a learning rate is searched from a tenth of the usual one to ten times that
LR_FACTOR = 10.0


@dataclass(frozen=True, kw_only=True)
class SearchKey:
    """Where a key's values come from: `choices`, or else a range.

    Attributes:
        low: smallest value.
        high: largest value, included.
        log: whether orders of magnitude are equally likely, instead of values.
        step: distance of neighbouring values; None for any (for whole numbers, 1).
        choices: the values; a key that is a list has lists for values.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()

    def __str__(self) -> str:
        """Return it as a person writes it."""
        if self.choices:
            return ", ".join(map(shown_value, self.choices))
        step = f", in steps of {self.step:g}" if self.step is not None else ""
        return f"{self.low:g} .. {self.high:g}{' (log)' if self.log else ''}{step}"


SearchSpace: TypeAlias = Mapping[str, SearchKey]


def default_space(config: TrainConfig) -> dict[str, SearchKey]:
    """Return what is worth searching for the config's method and task.

    The learning rate around the method's own (or the config's), the batch size around the
    config's, weight decay where matrices train, rank and alpha of LoRA's kin, and augmentation
    of images. Everything else stays as the config says.
    """
    space: dict[str, SearchKey] = {}
    if not config.find_lr:
        lr = learning_rate(config)
        space["lr"] = SearchKey(low=lr / LR_FACTOR, high=lr * LR_FACTOR, log=True)
    if config.batch_size:
        sizes = {max(1, config.batch_size // 2), config.batch_size, 2 * config.batch_size}
        space["batch_size"] = SearchKey(choices=tuple(sorted(sizes)))
    if config.method not in ("bitfit", "norm", "ia3"):
        space["weight_decay"] = SearchKey(low=1e-4, high=0.3, log=True)
    if config.method in LORA_METHODS:
        space["lora_r"] = SearchKey(choices=(4, 8, 16, 32))
        space["lora_alpha"] = SearchKey(choices=(8.0, 16.0, 32.0, 64.0))
    if task_kind(config.task) == "image":
        space["augment"] = SearchKey(choices=("flip", "standard", "randaugment"))
    return space


def read_search(path: Path, config: TrainConfig) -> dict[str, SearchKey]:
    """Read the table `[search]` of a TOML file; see `check_search`.

    Raises:
        ConfigError: the file can't be read, or says what can't be searched.
    """
    content = read_toml(path)
    for name in content:
        if name != "search":
            raise ConfigError(
                f"{path}: expected one table, [search], got {name!r} beside it; other keys"
                " belong into --config"
            )
    table = content.get("search")
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: has no table [search]")
    return check_search(table, config, where=f"{path}: search")


def parse_search(texts: Sequence[str], config: TrainConfig) -> dict[str, SearchKey]:
    """Read KEY=A,B,C and KEY=[log:]LOW..HIGH[:STEP], as flags give them; see `check_search`.

    Raises:
        ConfigError: a text is of another form, or says what can't be searched.
    """
    table: dict[str, object] = {}
    for text in texts:
        where = f"--search-key {text}"
        name, equals, rest = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not rest.strip():
            raise ConfigError(f"{where}: expected KEY=A,B,C or KEY=[log:]LOW..HIGH[:STEP]")
        if name in table:
            raise ConfigError(f"{where}: {name} is given twice")
        hint = _searched_hint(name, where)
        if get_origin(hint) is tuple:
            raise ConfigError(f"{where}: {name} is a list; search it in a file (--search)")
        found = re.fullmatch(r"(log:)?([^:]+?)\.\.([^:]+?)(?::([^:]+))?", rest.strip())
        # elsewhere two dots are part of a word, such as ../model
        if found and _scalar(hint) in (int, float):
            log, low, high, step = found.groups()
            entry = {"low": _read(low, hint, where), "high": _read(high, hint, where)}
            if log:
                entry["log"] = True
            if step:
                entry["step"] = _read(step, hint, where)
            table[name] = entry
        else:
            table[name] = [_read(item, hint, where) for item in rest.split(",")]
    return check_search(table, config, where="--search-key")


def check_search(
    table: Mapping[str, object], config: TrainConfig, *, where: str = "search"
) -> dict[str, SearchKey]:
    """Return the search space that `table` describes, in the config's own types.

    Args:
        table: name of a key of `TrainConfig` -> list of values, or a mapping with low, high and
            maybe log and step.
        config: what the keys that are not searched stay at.
        where: what is being read, for messages.

    Raises:
        ConfigError: a key is unknown or can't be searched, a value has the wrong type or lies
            outside the key's bounds, or values contradict each other or `config`.
    """
    if not table:
        raise ConfigError(f"{where}: expected at least one key, such as lr, got none")
    space = {name: _search_key(name, entry, where) for name, entry in table.items()}
    if config.find_lr and "lr" in space:
        raise ConfigError(
            f"{where}: lr: find_lr would replace what the search tries; leave one out"
        )
    for values in itertools.islice(_corners(space), MOST_COMBINATIONS):
        try:
            dataclasses.replace(config, **values)
        except ConfigError as error:
            said = ", ".join(f"{k} {shown_value(v)}" for k, v in values.items())
            raise ConfigError(f"{where}: {said}: {error}") from error
    return space


def grid_of(space: SearchSpace) -> dict[str, SearchKey]:
    """Return the same space in lists alone, as a grid needs it.

    Raises:
        ConfigError: a range has no step, so its values can't be counted.
    """
    hints = get_type_hints(TrainConfig)
    grid = {}
    for name, key in space.items():
        if key.choices:
            grid[name] = key
            continue
        assert key.low is not None
        assert key.high is not None
        whole = _scalar(hints[name]) is int
        if key.log or (key.step is None and not whole):
            raise ConfigError(f"search: {name}: a grid needs a list of values or a step, got {key}")
        step = key.step or 1.0
        count = round((key.high - key.low) / step) + 1
        values = [key.low + i * step for i in range(count)]
        # 0.1 + 2 * 0.1 is meant to be 0.3
        rounded = (int(v) if whole else float(f"{v:.12g}") for v in values)
        grid[name] = SearchKey(choices=tuple(rounded))
    return grid


def grid_size(grid: SearchSpace) -> int:
    """Return how many points a grid has."""
    return math.prod(len(key.choices) for key in grid.values())


def grid_values(grid: SearchSpace) -> dict[str, list[Any]]:
    """Return a grid as optuna's sampler takes it."""
    return {name: [_encoded(v) for v in key.choices] for name, key in grid.items()}


def suggest(trial: "Trial", space: SearchSpace) -> dict[str, Any]:
    """Draw what `trial` has not yet drawn; return all of its values, in the config's types."""
    hints = get_type_hints(TrainConfig)
    for name, key in sorted(space.items()):
        if key.choices:
            trial.suggest_categorical(name, [_encoded(v) for v in key.choices])
            continue
        assert key.low is not None
        assert key.high is not None
        if _scalar(hints[name]) is int:
            step = int(key.step or 1)
            trial.suggest_int(name, int(key.low), int(key.high), step=step, log=key.log)
        else:
            trial.suggest_float(name, key.low, key.high, step=key.step, log=key.log)
    return decoded(trial.params, space)


def decoded(params: Mapping[str, Any], space: SearchSpace) -> dict[str, Any]:
    """Return what optuna stored of a trial as values of the config."""
    values = {}
    for name in space:
        if name in params:
            stored = params[name]
            originals = {_encoded(v): v for v in space[name].choices}
            values[name] = originals.get(stored, stored)
    return values


def _search_key(name: str, entry: object, where: str) -> SearchKey:
    hint = _searched_hint(name, where)
    if isinstance(entry, Mapping):
        if "choices" not in entry and _scalar(hint) not in (int, float):
            raise ConfigError(f"{where}: {name}: is no number, so has no range; give a list")
        key = from_mapping(SearchKey, entry, where=f"{where}: {name}")
        if not key.choices:
            return _range(name, hint, entry, key, f"{where}: {name}")
        if any(k != "choices" for k in entry):
            raise ConfigError(f"{where}: {name}: expected choices or a range, got both")
        entry = entry["choices"]
    if not isinstance(entry, list | tuple):
        raise ConfigError(
            f"{where}: {name}: expected a list of values or {{low = ..., high = ...}},"
            f" got {entry!r}"
        )
    values = tuple(_checked(name, hint, value, f"{where}: {name}") for value in entry)
    if not values:
        raise ConfigError(f"{where}: {name}: expected values, got an empty list")
    if len({_encoded(v) for v in values}) < len(values):
        raise ConfigError(f"{where}: {name}: a value is there twice in {list(values)}")
    return SearchKey(choices=values)


def _range(
    name: str, hint: Any, entry: Mapping[str, object], key: SearchKey, where: str
) -> SearchKey:
    if key.low is None or key.high is None:
        raise ConfigError(f"{where}: expected low and high, got {', '.join(entry) or 'neither'}")
    low = _checked(name, hint, entry["low"], where)
    high = _checked(name, hint, entry["high"], where)
    if not low < high:
        raise ConfigError(f"{where}: expected low below high, got {low:g} and {high:g}")
    if key.log and (low <= 0 or key.step is not None):
        raise ConfigError(f"{where}: log needs low above 0 and no step, got {key}")
    if key.step is not None:
        step = _typed(name, hint, entry["step"], where)
        steps = (high - low) / step if step > 0 else math.nan
        if not abs(steps - round(steps if math.isfinite(steps) else 0)) < 1e-6:
            raise ConfigError(
                f"{where}: expected a step that leads from {low:g} to {high:g}, got {step:g}"
            )
    return key


def _searched_hint(name: str, where: str) -> Any:
    """Return the annotation of a key that may be searched."""
    hints = get_type_hints(TrainConfig)
    known = [n for n in hints if n not in FIXED_KEYS]
    if name in FIXED_KEYS:
        raise ConfigError(
            f"{where}: {name}: is the same in all trials, so that they can be compared; set it"
            " in --config or as a flag"
        )
    if name not in hints:
        raise ConfigError(f"{where}: unknown key {name!r}{nearest(name, known, ALIASES)}")
    return hints[name]


def _checked(name: str, hint: Any, value: object, where: str) -> Any:
    """Return `value` in the key's type and within its bounds."""
    typed = _typed(name, hint, value, where)
    if isinstance(typed, int | float) and not isinstance(typed, bool):
        bounds = TrainConfig.__dataclass_fields__[name].metadata
        low, high, above = bounds["low"], bounds["high"], bounds["above"]
        if not math.isfinite(typed):
            raise ConfigError(f"{where}: expected a finite number, got {typed}")
        if low is not None and typed < low:
            raise ConfigError(f"{where}: expected at least {low:g}, got {typed:g}")
        if above is not None and typed <= above:
            raise ConfigError(f"{where}: expected more than {above:g}, got {typed:g}")
        if high is not None and typed > high:
            raise ConfigError(f"{where}: expected at most {high:g}, got {typed:g}")
    return typed


def _typed(name: str, hint: Any, value: object, where: str) -> Any:
    one_key = dataclasses.make_dataclass("OneKey", [(name, hint)])
    prefix = where.removesuffix(f": {name}")
    return getattr(from_mapping(one_key, {name: value}, where=prefix), name)


def _scalar(hint: Any) -> Any:
    """Return int, float, bool or str for a key that is one of them (or None), else the hint."""
    options = [a for a in get_args(hint) if a is not type(None)]
    if get_origin(hint) is not tuple and len(options) == 1 and isinstance(options[0], type):
        return options[0]
    return hint


def _read(text: str, hint: Any, where: str) -> Any:
    """Return what a flag's text means for a key of this type."""
    text, kind = text.strip(), _scalar(hint)
    if kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"{where}: expected true or false, got {text!r}")
        return text == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{where}: expected {wanted}, got {text!r}") from None
    return text


def _corners(space: SearchSpace) -> Iterator[dict[str, Any]]:
    hints = get_type_hints(TrainConfig)
    ends = []
    for name, key in space.items():
        whole = _scalar(hints[name]) is int
        low_high = [int(e or 0) if whole else e for e in (key.low, key.high)]
        ends.append(list(key.choices) or low_high)
    for values in itertools.product(*ends):
        yield dict(zip(space, values, strict=True))


def _encoded(value: Any) -> Any:
    """Return a choice as optuna can store it: a list becomes JSON."""
    return json.dumps(value) if isinstance(value, list | tuple) else value


def shown_value(value: object) -> str:
    """Return a key's value as a person reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "+".join(map(str, value)) or "(none)"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shown_params(params: Mapping[str, Any]) -> str:
    """Return a trial's values on one line."""
    return ", ".join(f"{name} {shown_value(value)}" for name, value in params.items())
