"""What is on the screen, to the letter: lines, tables and pictures worked out by hand, and a pretended terminal."""

import io
import os
import time
from collections.abc import Callable

import pytest
import torch

from moe.model.routing import LoadSummary, summarise_load
from moe.training.console import (
    Console,
    DomainResult,
    can_show_blocks,
    domain_table,
    duration,
    load_picture,
    load_rows,
    load_table,
    printable,
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal, without a size, so of 80 columns."""

    def isatty(self) -> bool:
        return True


class AsciiTerminal(Terminal):
    encoding = "ascii"


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after ``text``, which moves the cursor by carriage returns, newlines and up."""
    lines = [""]
    row = column = 0
    position = 0
    while position < len(text):
        if text.startswith("\x1b[A", position):
            row = max(0, row - 1)
            position += 3
            continue
        character = text[position]
        assert character != "\x1b", "an escape sequence that this terminal does not know"
        if character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
        position += 1
    return [line.rstrip() for line in lines]


@pytest.fixture(autouse=True)
def ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


# ---------------------------------------------------------------------------------------------------------- plain lines


def test_without_a_terminal_there_is_a_line_every_n_steps_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with Console(25, every=10, stream=stream, clock=clock) as console:
        console.start()
        for step in range(1, 26):
            clock.now += 0.5
            # Fair is 2; the largest is 3 of them.
            console.update(step, loss=4.2126, tokens=6700, load=[[1, 3, 2, 2], [2, 2, 2, 2]])
        console.say("saved")
    # 6700 tokens in half a second; 15, 5 and 0 steps are left.
    assert stream.getvalue().splitlines() == [
        "step 10/25  loss 4.213  13,400 tokens/s  0:08 left  load max 1.50x",
        "step 20/25  loss 4.213  13,400 tokens/s  0:02 left  load max 1.50x",
        "step 25/25  loss 4.213  13,400 tokens/s  0:00 left  load max 1.50x",
        "saved",
    ]


def test_a_dense_model_has_no_load() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(100, every=1, stream=stream, clock=clock)
    clock.now += 2.0
    console.update(1, loss=torch.tensor(float("nan")), tokens=100)
    assert stream.getvalue() == "step   1/100  loss nan  50 tokens/s  3:18 left\n"


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream, clock = Terminal(), Clock()
    console = Console(2, every=1, stream=stream, clock=clock)
    clock.now += 1.0
    console.update(1, loss=1.0, tokens=10)
    assert stream.getvalue() == "step 1/2  loss 1.000  10 tokens/s  0:01 left\n"


def run_steps(seconds: Callable[[int], float], *, pause_after: int = 0) -> str:
    """The last of 20 lines of a run of 120 steps whose step n takes ``seconds(n)``, with 1000 tokens each."""
    stream, clock = io.StringIO(), Clock()
    console = Console(120, every=20, stream=stream, clock=clock)
    console.start()
    for step in range(1, 21):
        clock.now += seconds(step)
        console.update(step, loss=1.0, tokens=1000)
        if step == pause_after:
            with console.pause():
                clock.now += 600.0
    return stream.getvalue()


def test_validation_counts_neither_in_the_rate_nor_in_the_time_left() -> None:
    line = run_steps(lambda step: 1.0, pause_after=19)
    assert line == "step  20/120  loss 1.000  1,000 tokens/s  1:40 left\n"


def test_a_slow_first_step_is_forgotten() -> None:
    assert run_steps(lambda step: 90.0 if step == 1 else 1.0) == run_steps(lambda step: 1.0)


def test_the_time_left_follows_the_speed_of_late() -> None:
    """18 steps of 1 s, then two of 10 s: they count for more than their share of the run."""
    line = run_steps(lambda step: 10.0 if step > 18 else 1.0)
    left = line.split("  ")[-1]
    minutes, seconds = left.removesuffix(" left\n").split(":")
    # By hand: memory max(0.8, e^-1) = 0.8 a step. Before: r = e^-0.1, sums (1 - r^17)/(1 - r) = 8.5870 steps and
    # as many seconds (the first step is forgotten, 17 remain). After two slow ones: steps 0.64 * 8.5870 + 1.8 = 7.2957,
    # seconds 0.64 * 8.5870 + 18 = 23.4957; 100 steps are left.
    assert int(minutes) * 60 + int(seconds) == round(100 * 23.4957 / 7.2957)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0:00"), (59.6, "1:00"), (161, "2:41"), (3761, "1:02:41"), (86399, "23:59:59"), (273600, "3 d 4 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


# -------------------------------------------------------------------------------------------------------------- the bar


def test_a_terminal_shows_a_bar_and_the_load_of_each_layer() -> None:
    stream, clock = Terminal(), Clock()
    console = Console(4, moe_layers=[1, 3], stream=stream, clock=clock)
    for step in (1, 2):
        clock.now += 1.0
        console.update(step, loss=4.2126, tokens=13400, load=torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0]]))
    # 79 columns: "step 2/4 |" and "| loss 4.213  13,400 tokens/s  0:02 left" leave 29, of which half are full.
    assert screen(stream.getvalue()) == [
        "step 2/4 |" + "█" * 14 + "▌" + " " * 14 + "| loss 4.213  13,400 tokens/s  0:02 left",
        "load max  4.00x  1 ▄▄▄▄  3 █···",
    ]
    console.close()
    assert screen(stream.getvalue())[1:] == [""]
    assert screen(stream.getvalue())[0].startswith("step 2/4 |█")


def test_where_there_are_no_blocks_digits_and_hashes_stand_in() -> None:
    stream, clock = AsciiTerminal(), Clock()
    with Console(4, moe_layers=[0], stream=stream, clock=clock) as console:
        clock.now += 1.0
        console.update(2, loss=1.0, tokens=10, load=[[2, 2, 4, 0]])
        assert stream.getvalue().isascii()
        lines = screen(stream.getvalue())
    assert "|######" in lines[0]
    assert lines[1] == "load max  2.00x  0 4480"


def test_messages_stand_above_the_bar_and_leave_it_whole() -> None:
    stream, clock = Terminal(), Clock()
    with Console(4, moe_layers=[0], stream=stream, clock=clock) as console:
        console.say("reading the corpus")
        for step in (1, 2):
            clock.now += 1.0
            console.update(step, loss=1.0, tokens=10, load=[[1, 1]])
            console.say(f"saved step {step}")
        lines = screen(stream.getvalue())
        assert lines[:3] == ["reading the corpus", "saved step 1", "saved step 2"]
        assert lines[3].startswith("step 2/4 |") and lines[3].endswith("| loss 1.000  10 tokens/s  0:02 left")
        assert lines[4] == "load max  1.00x  0 ▄▄"
        assert len(lines) == 5


def test_the_bar_is_redrawn_ten_times_a_second_at_most_and_at_the_last_step() -> None:
    stream, clock = Terminal(), Clock()

    class Loss:
        looked_at = 0

        def __float__(self) -> float:
            self.looked_at += 1
            return 1.0

    loss = Loss()
    with Console(1000, stream=stream, clock=clock) as console:
        for step in range(1, 1001):
            clock.now += 0.001
            console.update(step, loss=loss, tokens=1)
        assert "step 1000/1000 |" in screen(stream.getvalue())[0]
    # One second: the first step, nine or ten on the way, the last.
    assert 10 <= loss.looked_at <= 12


def test_a_step_costs_little() -> None:
    load = torch.randint(100, (4, 16))
    with Console(10**9, moe_layers=range(4), stream=Terminal()) as console:
        console.update(1, loss=1.0, tokens=1, load=load)
        began = time.perf_counter()
        for step in range(2, 5002):
            console.update(step, loss=1.0, tokens=1, load=load)
        assert (time.perf_counter() - began) / 5000 < 0.0002


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_the_bar_is_as_wide_as_a_real_terminal() -> None:
    import fcntl
    import struct
    import termios

    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with os.fdopen(follower, "w", encoding="utf-8") as stream, Console(4, stream=stream) as console:
        console.update(2, loss=1.0, tokens=10)
        shown = os.read(leader, 10_000).decode()
    os.close(leader)
    # One column stays free.
    assert len(screen(shown)[0]) == 119


# -------------------------------------------------------------------------------------------------------- load pictures


def test_pictures_of_hand_made_loads() -> None:
    assert load_picture([5] * 8) == "▄▄▄▄▄▄▄▄"
    assert load_picture([0, 0, 12, 0]) == "··█·"
    assert load_picture([3, 3, 3, 3, 0, 0, 0, 0]) == "████····"
    # Fair is 40; a tenth of it is alive, less is dead; 1/4, 1/2, 3/4, 1, 5/4, 3/2 of it and the rest.
    assert load_picture([4, 3, 10, 20, 30, 40, 50, 60, 143]) == "▁·▁▂▃▄▅▆█"
    assert load_picture([4, 3, 10, 20, 30, 40, 50, 60, 143], unicode=False) == "101234568"


def test_a_layer_that_routed_nothing_is_dead() -> None:
    assert load_picture([0, 0, 0]) == "···"


def test_many_experts_are_shown_by_rank() -> None:
    """64 experts, 7 of them idle: sorted, every 9th of them and the last, so that the idle ones are seen."""
    counts = [0 if expert % 10 == 3 else 64 for expert in range(64)]
    assert load_picture(counts, columns=8) == "▄▄▄▄▄▄▄·"
    assert load_picture([1] * 17) == "▄" * 16


def test_the_dots_are_as_many_as_the_dead_experts_of_the_summary() -> None:
    # Fair is 100: 9 and 0 are less than a tenth of it.
    counts = torch.tensor([100, 9, 10, 0, 300, 11, 170, 200])
    assert load_picture(counts.tolist()).count("·") == summarise_load(counts).dead == 2


def test_layers_stand_side_by_side_as_many_as_fit() -> None:
    """Each cell is "  3 ▄▄▄▄", 8 columns, after a heading of 15."""
    counts = [[1, 1, 1, 1]] * 4
    assert load_rows(counts, range(4), 15 + 4 * 8) == ["load max  1.00x  0 ▄▄▄▄  1 ▄▄▄▄  2 ▄▄▄▄  3 ▄▄▄▄"]
    assert load_rows(counts, range(4), 15 + 3 * 8) == [
        "load max  1.00x  0 ▄▄▄▄  1 ▄▄▄▄",
        "                 2 ▄▄▄▄  3 ▄▄▄▄",
    ]
    assert load_rows([], [], 80) == []


def test_of_too_many_layers_some_are_shown_and_the_worst_load_is_still_that_of_all() -> None:
    counts: list[list[float]] = [[1.0, 1.0] for _ in range(20)]
    counts[1] = [2.0, 0.0]
    # A cell is "  19 ▄▄", 7 columns: one a row.
    assert load_rows(counts, range(20), 15 + 7) == [
        "load max  2.00x   0 ▄▄",
        "4 of 20 layers    6 ▄▄",
        "                 13 ▄▄",
        "                 19 ▄▄",
    ]


@pytest.mark.parametrize("columns", [40, 79, 119])
@pytest.mark.parametrize(("layers", "experts"), [(1, 4), (4, 16), (27, 64), (61, 256)])
def test_the_rows_fit_the_terminal(columns: int, layers: int, experts: int) -> None:
    rows = load_rows([[1.0] * experts] * layers, range(layers), columns)
    assert 1 <= len(rows) <= 4
    assert max(map(len, rows)) <= columns


def test_which_streams_can_show_blocks() -> None:
    def of(encoding: str) -> io.TextIOWrapper:
        return io.TextIOWrapper(io.BytesIO(), encoding=encoding)

    assert can_show_blocks(of("utf-8"))
    assert not can_show_blocks(of("ascii"))
    assert not can_show_blocks(of("latin-1"))


# --------------------------------------------------------------------------------------------------------------- tables


def result(domain: str, tokens: int, n_bytes: int, bits_per_byte: float) -> DomainResult:
    return DomainResult(
        domain=domain,
        tokens=tokens,
        n_bytes=n_bytes,
        cross_entropy=3.9124,
        bits_per_byte=bits_per_byte,
        gzip=2.9,
        xz=2.5,
    )


def test_the_table_of_domains() -> None:
    table = domain_table(
        [result("speeches", 24310, 98304, 1.5), result("code", 990, 4096, 2.625)], result("all", 25300, 102400, 1.55)
    )
    assert table.splitlines() == [
        "validation: cross-entropy in nats/token and bits/byte; gzip and xz in bits/byte",
        "",
        "domain    tokens    bytes  nats/token  bits/byte  gzip -9  xz -9e  ratio to xz",
        "------------------------------------------------------------------------------",
        "speeches  24,310   98,304       3.912      1.500    2.900   2.500        0.60x",
        "code         990    4,096       3.912      2.625    2.900   2.500        1.05x",
        "------------------------------------------------------------------------------",
        "all       25,300  102,400       3.912      1.550    2.900   2.500        0.62x",
    ]


def test_a_long_name_is_cut_so_that_the_table_stays_within_100_columns() -> None:
    table = domain_table([result("n" * 90, 10**12, 10**12, 1.5)], result("all", 10**12, 10**12, 1.5))
    assert max(map(len, table.splitlines())) == 100
    assert "1,000,000,000,000" in table


def test_the_table_of_the_load() -> None:
    counts = [[2, 2, 2, 2], [4, 4, 0, 0]]
    summaries = [
        LoadSummary(max_over_fair=1.0, min_over_fair=1.0, dead=0, entropy=1.0, dropped=0.0),
        LoadSummary(max_over_fair=2.0, min_over_fair=0.0, dead=2, entropy=0.5, dropped=0.125),
    ]
    assert load_table([1, 3], summaries, counts, [2.0, 1.754]).splitlines() == [
        "load of the experts (in order; half a character is the fair share)",
        "",
        "layer     max/fair  min/fair  dead  entropy  dropped  MLPs/token  load",
        "----------------------------------------------------------------------",
        "1            1.00x     1.00x     0    1.000    0.00%        2.00  ▄▄▄▄",
        "3            2.00x     0.00x     2    0.500   12.50%        1.75  ██··",
        "----------------------------------------------------------------------",
        "balanced     1.00x     1.00x     0    1.000    0.00%              ▄▄▄▄",
    ]
    assert load_table([1, 3], summaries, torch.tensor(counts), [2.0, 1.75], unicode=False).isascii()


def test_the_table_says_which_experts_have_no_mlp() -> None:
    counts = torch.tensor([[3, 1, 2, 2]])

    table = load_table([0], [summarise_load(counts[0])], counts, [1.0], n_special=2)

    assert table.startswith("load of the experts (in order, the last 2 without an MLP; half")


def test_the_table_of_256_experts_stays_within_100_columns() -> None:
    counts = torch.arange(256)[None]
    table = load_table([0], [summarise_load(counts[0])], counts, [256.0], n_special=8)
    assert max(map(len, table.splitlines())) <= 100
    assert "sorted, 32 of 256, 8 without an MLP" in table
    assert "balanced  " in table


def test_what_a_model_writes_cannot_disturb_the_terminal() -> None:
    assert printable("a\x1b[2J b\r\n\tc é \x00") == "a\\x1b[2J b\\r\n\tc é \\x00"


def test_a_screen_without_the_characters_gets_escapes() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")

    Console(1, stream=stream).say("load ▄")

    stream.seek(0)
    assert stream.read() == "load \\u2584\n"
