"""``python -m moe study RUN``: all that is known of a run's routing, as a page, as numbers and in plain words."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from tqdm import tqdm

from moe import config_file
from moe.errors import UserError
from moe.study.compare import (
    Comparison,
    Spread,
    compare,
    over_seeds,
    paired_differences,
    require_same_tokens,
    require_scipy,
    side_by_side,
)
from moe.study.imported import import_record
from moe.study.measurement import Array, Measurement
from moe.study.page import write_page
from moe.study.plots import graph_objects, plot, require_browser, save_all
from moe.study.storage import HEADER
from moe.study.study import ABLATION_TOKENS, OF_THE_MODEL, Study, load, on_stderr
from moe.training.command import MAY_CHANGE
from moe.training.console import showable
from moe.training.machine import choose_device, keep_freed_memory

USAGE = "python -m moe study RUN [RUN ...] [--tokens N] [--out FILE.html] [--figures FOLDER] [--no-ablation]"
MEANING = """\
Where do tokens go, and why? Of one RUN: record the routing of its held-out text (kept in RUN/records), take every
metric, knock out every expert in turn, and write RUN/study/index.html, to look at, and RUN/study/study.json.
Of two: match their experts by the tokens that they get, and show every metric side by side. Of more, or of two that
differ in the seed alone: mean and 95 % interval over seeds; of as many seeds of two configurations: their difference,
seed by seed. A RUN is a run folder, one of its checkpoints (RUN/checkpoints/step-00000250), or a record's folder.
With --import, of a published mixture model: record its routing of the text in the files, a domain each."""
FLAGS = {
    "--tokens N": "record about N held-out tokens, as many of each domain (default: all)",
    "--ablation-tokens N": f"tokens on which experts are knocked out (default {ABLATION_TOKENS})",
    "--no-ablation": "knock out no expert: several times faster",
    "--out FILE.html": "where the page goes, its numbers beside it (default RUN/study/index.html)",
    "--figures FOLDER": "write every picture to this folder too",
    "--format NAME": "of these pictures: png, svg or pdf (default svg)",
    "--import FOLDER": "a transformers checkpoint with its tokenizer, in place of a RUN",
    "--text FILE ...": "with --import, the text files to read",
    "--help": "show this",
}
FORMATS = ("svg", "png", "pdf")

FORMAT = 1
"""of study.json; raised whenever a reader of the old files would misread the new ones"""
COLUMNS = 8
"""layers that a table shows at most, evenly spread"""
SMALL_AXES = ("choice", "measure", "precision", "experts")
"""axes of which a table shows every label, in a line each"""


class Row(NamedTuple):
    """A line of a table."""

    name: str
    cells: list[str]
    """one for each layer"""
    chance: str
    null: str


def study_command(arguments: Sequence[str]) -> int:
    """``python -m moe study RUN [RUN ...]``: record, measure, intervene, compare and show."""
    line = config_file.parse_flags(arguments, FLAGS)
    options = line.options
    if "--help" in options:
        print(USAGE, "", MEANING, "", *(f"  {flag:22}{meaning}" for flag, meaning in FLAGS.items()), sep="\n")
        return 0
    if line.overrides:
        raise UserError(f"--{next(iter(line.overrides))} belongs to training: a run's settings are in its folder")
    # All that can be refused is refused before the first minute of work.
    tokens = _count(options, "--tokens")
    ablation_tokens = _count(options, "--ablation-tokens")
    if "--no-ablation" in options and ablation_tokens is not None:
        raise UserError("--ablation-tokens is given beside --no-ablation; keep one of them")
    if "--format" in options and "--figures" not in options:
        raise UserError(f"--format {options['--format']} is of pictures, and there are none without --figures FOLDER")
    if options.get("--format", "svg") not in FORMATS:
        raise UserError(f"--format is {options['--format']}, and must be one of {', '.join(FORMATS)}")
    if "--figures" in options:
        require_browser()
    if not options.get("--out", ".html").endswith(".html"):
        raise UserError(f"--out is {options['--out']}, and must end in .html")
    if "--text" in options and "--import" not in options:
        raise UserError("--text is what an imported model reads, and there is none: add --import FOLDER")
    graph_objects()
    keep_freed_memory()

    if "--import" in options:
        if tokens is not None:
            raise UserError("--tokens is of held-out text; with --import all text in the files is read")
        paths = [_import(options, line.positional)]
    else:
        paths = [Path(name) for name in line.positional]
    if not paths:
        raise UserError(f"a run folder is needed: {USAGE}")
    places = [path.resolve() for path in paths]
    if repeated := [str(path) for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"{repeated[-1]} is given twice; keep one of them")
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: there is no such folder; a run is a folder below runs/")
    if len(paths) == 1:
        _study_one(load(paths[0], tokens), options, ablation_tokens or ABLATION_TOKENS)
        return 0
    for flag in ("--out", "--ablation-tokens"):
        if flag in options:
            raise UserError(f"{flag} is for the study of one run; several are compared by numbers and by --figures")
    require_scipy()
    # Whether they can be compared at all is known before any is recorded.
    arms = _arms([load_config(path) for path in paths], paths)
    studies = [load(path, tokens) for path in paths]
    _study_several(studies, arms, options)
    return 0


# -------------------------------------------------------------------------------------------------------------- one run


def _study_one(study: Study, options: Mapping[str, str], ablation_tokens: int) -> None:
    measurements = study.measurements()
    if "--no-ablation" not in options and study.run is not None:
        with _threads_on_idle_cores():
            study.ablate(ablation_tokens)
    found = study.findings(measurements)
    for name, ablated in (("delta_loss", study.delta_loss), ("loss_by_k", study.loss_by_k)):
        if ablated is not None:
            measurements[name] = ablated

    folder = _folder_of(study)
    page = Path(options["--out"]) if "--out" in options else folder / "index.html"
    # A page elsewhere takes its numbers along: those of the study that is in the run belong to the page there.
    numbers = page.with_suffix(".json") if "--out" in options else folder / "study.json"
    written = {
        "format": FORMAT,
        **study.facts(),
        "findings": found,
        "measurements": {name: as_json(measurement) for name, measurement in measurements.items()},
    }

    def write(path: Path) -> None:
        write_page(
            path,
            final=study.final,
            over_training=study.over_training,
            measurements=measurements,
            delta_loss=study.delta_loss,
            loss_by_k=study.loss_by_k,
            facts=study.facts(),
        )

    _write({page: write, numbers: _json_writer(written)})
    _say(table_text(_rows(measurements, study.final.blocks), study.final.blocks))
    _say("\n" + "\n".join(f"- {sentence}" for sentence in found))
    _say(f"\nto look at: {page}\nall numbers: {numbers}")
    _write_figures(measurements, options, study.say)


@contextmanager
def _threads_on_idle_cores() -> Iterator[None]:
    """Let torch use no more cores than nobody else uses; as many as it is told to where ``OMP_NUM_THREADS`` says so.

    A knockout is thousands of small operations, at the end of each of which threads wait for one another: with one of
    two cores taken by others, two threads were four to ten times slower than one (89 s and 32 s, against 8 s).
    """
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "getloadavg"):
        torch.set_num_threads(_idle_cores(before, os.cpu_count() or 1, os.getloadavg()[0]))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _idle_cores(threads: int, cores: int, load: float) -> int:
    """At least one, and not more than ``threads``; ``load`` is the number of threads at work in the last minute.

    One of them was this process.
    """
    return max(1, min(threads, cores - max(round(load) - 1, 0)))


def _folder_of(study: Study) -> Path:
    """Where the study of a model goes: into its run, or beside its record."""
    if study.run is None:
        return study.folder.parent / f"{study.folder.name}-study"
    if study.is_newest:
        return study.run.path / "study"
    return study.run.path / f"study-{study.final.step:08d}"


# --------------------------------------------------------------------------------------------------------- several runs


def load_config(path: Path) -> dict[str, Any] | None:
    """The settings by dotted key of the run that ``path`` is of; None for a record alone, or what is no run."""
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    config = run / "config.yaml"
    return _flat(yaml.safe_load(config_file.dump(config_file.load(config)))) if config.is_file() else None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The settings in which two runs differ, but for the seed, names, and what changes no number."""
    free = {"training.seed", "training.record_every", "run.name", "run.folder", *MAY_CHANGE} - {"training.steps"}
    return sorted(key for key in one.keys() | other.keys() if key not in free and one.get(key) != other.get(key))


def _arms(configs: Sequence[dict[str, Any] | None], paths: Sequence[Path]) -> list[list[int]]:
    """The runs by configuration, each a list of places in ``paths`` in the order of their seeds.

    Raises UserError where there are three or more that are neither seeds of one configuration nor as many seeds of two.
    """
    arms: list[list[int]] = []
    for place, config in enumerate(configs):
        for arm in arms:
            first = configs[arm[0]]
            if config is not None and first is not None and not differences(first, config):
                arm.append(place)
                break
        else:
            arms.append([place])
    seeds = [[_seed(configs[place]) for place in arm] for arm in arms]
    checkpoints = any(path.parent.name == "checkpoints" for path in paths)
    if len(paths) == 2:
        same = len(arms) == 1 and len(set(seeds[0])) == 2 and not checkpoints
        return arms if same else [[0], [1]]
    # Two of one configuration and seed are a run and its copy, or two of its checkpoints: no seeds.
    if checkpoints or any(len(set(its)) < len(its) for its in seeds):
        raise UserError(f"{paths[0]} and the others: three or more must be runs that differ in training.seed")
    if len(arms) == 1 or (len(arms) == 2 and sorted(seeds[0]) == sorted(seeds[1])):
        return [sorted(arm, key=lambda place: _seed(configs[place])) for arm in arms]
    left, right = arms[0][0], arms[1][0]
    differ = differences(configs[left] or {}, configs[right] or {})
    raise UserError(
        f"{paths[left]} and {paths[right]} differ in {', '.join(differ[:3]) or 'what is known of them'}: compare two "
        "runs, seeds of one configuration, or the same seeds of two"
    )


def _seed(config: Mapping[str, Any] | None) -> int:
    return -1 if config is None else int(config["training.seed"])


def _study_several(studies: Sequence[Study], arms: Sequence[Sequence[int]], options: Mapping[str, str]) -> None:
    folder = _folder_of(studies[0])
    others = "-".join(Path(study.name).name for study in studies[1:])
    written: dict[str, Any] = {"format": FORMAT, "runs": [study.name for study in studies]}
    pictures: dict[str, Measurement] = {}
    blocks = studies[0].final.blocks
    texts = []
    if len(studies) == 2:
        one, other = studies
        comparison = compare(one.final, other.final, (one.name, other.name))
        measured = [_of_records(one), _of_records(replace(other, final=comparison.renumbered))]
        text, parts = _comparison(comparison, measured)
        texts.append(text)
        pictures |= {name: part for name, part in parts.items() if isinstance(part, Measurement)}
        for name in measured[0].keys() & measured[1].keys():
            # Where axes differ, there are only the numbers.
            with suppress(ValueError):
                pictures[name] = side_by_side([its[name] for its in measured], comparison.names)
        written |= {
            "matching": dict(
                zip(comparison.matching.blocks, map(np.ndarray.tolist, comparison.matching.partners), strict=True)
            ),
            **{name: part_as_json(part) for name, part in parts.items()},
            "measurements": {
                name: [None if name not in its else as_json(its[name]) for its in measured] for name in measured[0]
            },
        }
    else:
        if len(arms) == 2:
            for place, its in zip(*arms, strict=True):
                require_same_tokens([studies[n].final for n in (place, its)], [studies[n].name for n in (place, its)])
        measured = [_of_records(study) for study in studies]
    runs = [[list(measured[place].values()) for place in arm] for arm in arms]
    for number, arm in enumerate(runs):
        if len(arm) > 1:
            spreads = over_seeds(arm)
            its = [studies[place] for place in arms[number]]
            names = ", ".join(study.name for study in its)
            texts.append(f"mean ± half of the 95 % interval over {len(arm)} seeds ({names}){_note(its)}")
            texts.append(table_text(_spread_rows(spreads, blocks), blocks))
            written[f"seeds {number + 1}"] = {_key(spread): spread_as_json(spread) for spread in spreads}
    if len(arms) == 2 and len(runs[0]) > 1:
        spreads = paired_differences(*runs)
        texts.append(
            f"{studies[arms[1][0]].name} less {studies[arms[0][0]].name}, seed by seed: mean difference ± half of the "
            f"95 % interval over {len(runs[0])} pairs; * where it leaves out 0 (of {_cells(spreads)} values, 5 % would)"
        )
        texts.append(table_text(_spread_rows(spreads, blocks, mark=True), blocks))
        written["differences"] = {_key(spread): spread_as_json(spread) for spread in spreads}
    path = folder / f"compared-with-{others}.json"
    _write({path: _json_writer(written)})
    _say("\n\n".join(texts))
    _say(f"\nall numbers: {path}")
    _write_figures(pictures, options, studies[0].say)


def _note(studies: Sequence[Study]) -> str:
    """What to know of seeds whose records are of different tokens."""
    try:
        require_same_tokens([study.final for study in studies])
    except UserError:
        return "; their held-out text differs, and the interval holds that too"
    return ""


def _of_records(study: Study) -> dict[str, Measurement]:
    """Every metric that needs no weights."""
    return study.measurements(without=OF_THE_MODEL)


def _comparison(
    comparison: Comparison, measured: Sequence[Mapping[str, Measurement]]
) -> tuple[str, dict[str, Measurement | Spread]]:
    """Two models side by side in words, and what was measured between them."""
    one, other = comparison.names
    blocks = tuple(str(block) for block in comparison.matching.blocks)
    agreement, overlap, loss = comparison.agreement(), comparison.partner_overlap(), comparison.loss_difference()
    rows: Sequence[Row] = _rows({"agreement": agreement, "partner_overlap": _over_experts(overlap)}, blocks)
    losses = [
        f"  {label:12} {value:+.4f} ± {half:.4f}{'' if abs(value) > half else '  (no difference seen)'}"
        for label, value, half in zip(loss.mean.axes[0].labels, loss.mean.values, loss.half_width, strict=True)
    ]
    lines: list[Row] = []
    both = comparison.one.blocks
    of_one, of_other = (_rows(its, both) for its in measured)
    for row in of_one:
        lines.append(row)
        lines += [its._replace(name=f"  {other}") for its in of_other if its.name == row.name]
    text = "\n".join(
        [
            f"{one} and {other}: experts matched by the tokens that they get\n",
            table_text(rows, blocks),
            f"\nloss of {other} less that of {one}, nats a token, 95 % interval over sequences",
            *losses,
            f"\nside by side: {one}, and below it {other}, with matched experts\n",
            table_text(lines, both),
        ]
    )
    return text, {"agreement": agreement, "partner_overlap": overlap, "loss_difference": loss}


def _over_experts(overlap: Measurement) -> Measurement:
    """The mean over experts, for a line of a table."""
    known = np.isfinite(overlap.values)
    total = np.where(known, overlap.values, 0).sum(axis=1)
    mean = np.divide(total, known.sum(axis=1), out=np.full(len(total), np.nan), where=known.any(axis=1))
    chance = None if overlap.chance is None else overlap.chance[:, 0]
    return replace(overlap, title=f"{overlap.title} (mean)", values=mean, axes=overlap.axes[:1], chance=chance)


# --------------------------------------------------------------------------------------------------------------- import


def _import(options: Mapping[str, str], more: Sequence[str]) -> Path:
    """Record a transformers checkpoint over text files; the folder of the record."""
    if "--text" not in options:
        raise UserError("--import needs --text FILE ...: text files to read, a domain each")
    checkpoint = Path(options["--import"])
    files = [Path(name) for name in (options["--text"], *more)]
    documents: dict[str, list[str]] = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read as text: {error}") from None
        if not text.strip():
            raise UserError(f"{file}: holds no text")
        if file.stem in documents:
            raise UserError(f"{file}: is of the domain {file.stem}, as another file is; rename one of them")
        documents[file.stem] = [text]
    folder = Path("runs") / f"{checkpoint.resolve().name}-record"
    if (folder / HEADER).is_file():
        raise UserError(f"{folder}: exists; study it again with python -m moe study {folder}, or remove it")
    on_stderr(f"recording {checkpoint} to {folder}")
    with tqdm(unit="token", unit_scale=True, desc="record", leave=False, disable=None) as bar:
        import_record(checkpoint, documents, folder, device=choose_device("auto"), advance=bar.update)
    return folder


# --------------------------------------------------------------------------------------------------------------- tables


def table_text(rows: Sequence[Row], blocks: Sequence[str]) -> str:
    """Aligned columns: what, a column for each layer (some, evenly spread, of many), chance, null."""
    shown = _shown(len(blocks))
    header = ["layer", *(blocks[place] for place in shown), "chance", "null"]
    lines = [header] + [[row.name, *(row.cells[place] for place in shown), row.chance, row.null] for row in rows]
    if not any(line[-1] for line in lines[1:]):
        lines = [line[:-1] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            [f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))]
        )
        for first, *others in lines
    ]
    rule = "-" * max(map(len, text))
    return "\n".join([text[0].rstrip(), rule, *(line.rstrip() for line in text[1:])])


def _shown(n_layers: int) -> list[int]:
    if n_layers <= COLUMNS:
        return list(range(n_layers))
    return sorted({round(place * (n_layers - 1) / (COLUMNS - 1)) for place in range(COLUMNS)})


def _rows(measurements: Mapping[str, Measurement], blocks: Sequence[str]) -> list[Row]:
    """A line for each metric that has a value for each layer, or one for each label of a small axis."""
    rows: list[Row] = []
    for measurement in measurements.values():
        for title, values, chance, null in _lines(measurement):
            cells = {label: _spelled(value) for label, value in values.items()}
            rows.append(Row(title, [cells.get(block, "") for block in blocks], _range(chance), _range(null)))
    return rows


def _spread_rows(spreads: Iterable[Spread], blocks: Sequence[str], *, mark: bool = False) -> list[Row]:
    rows: list[Row] = []
    for spread in spreads:
        widths = [half for _, half, _, _ in _lines(replace(spread.mean, values=spread.half_width, null=None))]
        for (title, values, chance, null), halves in zip(_lines(spread.mean), widths, strict=True):
            cells = {
                label: f"{_spelled(value)} ± {_spelled(halves[label])}"
                + ("*" if mark and abs(value) > halves[label] else " " * mark)
                for label, value in values.items()
            }
            rows.append(Row(title, [cells.get(block, "") for block in blocks], _range(chance), _range(null)))
    return rows


Line = tuple[str, dict[str, float], Array | None, Array | None]


def _lines(measurement: Measurement) -> list[Line]:
    """(what, value by layer, chance, null) for each combination of labels of small axes; none for other axes."""
    names = [axis.name for axis in measurement.axes]
    if not names or names[0] not in ("layer", "layers") or not set(names[1:]) <= set(SMALL_AXES):
        return []
    labels = measurement.axes[0].labels
    if names[0] == "layers":  # between two layers: told of the later
        labels = tuple(label.rpartition(" ")[2] for label in labels)
    shape = measurement.values.shape
    lines = []
    for place in np.ndindex(*shape[1:]):
        of = ", ".join(axis.labels[index] for axis, index in zip(measurement.axes[1:], place, strict=True))
        here = (slice(None), *place)

        def part(values: Array | None, here: tuple[Any, ...] = here) -> Array | None:
            return None if values is None else np.broadcast_to(values, shape)[here]

        values = dict(zip(labels, measurement.values[here].tolist(), strict=True))
        title = measurement.title + (f": {of}" if of else "")
        lines.append((title, values, part(measurement.chance), part(measurement.null)))
    return lines


def _spelled(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 and value != int(value) else f"{value:,.0f}"


def _range(values: Array | None) -> str:
    """One number where all layers share it, else the least and the largest."""
    known = [] if values is None else sorted({_spelled(value) for value in np.ravel(values).tolist()} - {"-"}, key=len)
    if not known:
        return ""
    assert values is not None
    low, high = _spelled(float(np.nanmin(values))), _spelled(float(np.nanmax(values)))
    return low if low == high else f"{low} to {high}"


def _say(text: str) -> None:
    print(showable(text, sys.stdout))


# -------------------------------------------------------------------------------------------------------------- writing


def as_json(measurement: Measurement) -> dict[str, Any]:
    """A measurement as JSON holds it; what is not finite is null."""
    return {
        "name": measurement.name,
        "title": measurement.title,
        "reading": measurement.reading,
        "unit": measurement.unit,
        "axes": [{"name": axis.name, "labels": list(axis.labels)} for axis in measurement.axes],
        "values": _numbers(measurement.values),
        "chance": _numbers(measurement.chance),
        "null": _numbers(measurement.null),
        "null_std": _numbers(measurement.null_std),
    }


def spread_as_json(spread: Spread) -> dict[str, Any]:
    """A mean and its interval as JSON holds them."""
    return {**as_json(spread.mean), "half_width": _numbers(spread.half_width), "n": spread.n}


def part_as_json(part: Measurement | Spread) -> dict[str, Any]:
    """Either of the two."""
    return as_json(part) if isinstance(part, Measurement) else spread_as_json(part)


def _numbers(values: Array | None) -> Any:
    """Nested lists, null for what is not finite, which JSON has not."""
    if values is None:
        return None
    finite = np.isfinite(values)
    return values.tolist() if finite.all() else np.where(finite, values, None).tolist()  # type: ignore[call-overload]


def _key(spread: Spread) -> str:
    return spread.mean.title


def _cells(spreads: Iterable[Spread]) -> int:
    return sum(spread.mean.values.size for spread in spreads)


def _json_writer(data: Mapping[str, Any]) -> Callable[[Path], None]:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return lambda path: (path.write_text(text, encoding="utf-8"), None)[1]


def _write(files: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write all files, each beside its place first, so that either all are new or none is touched."""
    partial = {path: path.with_name(f".partial-{path.name}") for path in files}
    made = []
    try:
        for path, write in files.items():
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True)
                made.append(path.parent)
            write(partial[path])
        for path, whole in partial.items():
            whole.replace(path)
    except BaseException as error:
        for whole in partial.values():
            whole.unlink(missing_ok=True)
        for folder in made:
            if not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{error.filename or next(iter(files))}: cannot be written ({error.strerror})") from error
        raise


def _write_figures(
    measurements: Mapping[str, Measurement], options: Mapping[str, str], say: Callable[[str], object]
) -> None:
    """Every measurement that can be drawn as a picture in the folder of ``--figures``."""
    if "--figures" not in options:
        return
    folder, suffix = Path(options["--figures"]), options.get("--format", "svg")
    figures = {}
    for name, measurement in measurements.items():
        if not np.isfinite(measurement.values).any():
            continue
        try:
            figures[folder / f"{name.replace(' ', '_')}.{suffix}"] = plot(measurement)
        except UserError as reason:
            say(f"no picture of {name}: {reason}")
    say(f"drawing {len(figures)} pictures to {folder}")
    try:
        save_all(figures)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from error


def _count(options: Mapping[str, str], flag: str) -> int | None:
    """The value of ``flag``, a whole number from 1 on; None where it is not given."""
    if flag not in options:
        return None
    try:
        number = int(options[flag])
    except ValueError:
        raise UserError(f"{flag} is {options[flag]!r}, and must be a whole number") from None
    if number < 1:
        raise UserError(f"{flag} is {number}, and must be 1 or more")
    return number
