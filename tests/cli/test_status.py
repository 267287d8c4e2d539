"""The status line: drawn on terminals, out of the way of others, gone at the end; never in a pipe."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import pytest

from padfree.cli import main
from padfree.cli import status as module
from padfree.cli.status import Status, lasting, plain


class Terminal(io.StringIO):
    """A screen, 40 columns wide, that says when a text was drawn."""

    def __init__(self, awaited: str = "") -> None:
        super().__init__()
        self.awaited, self.came = awaited, threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        length = super().write(text)
        if self.awaited in text:
            self.came.set()
        return length

    def screen(self) -> list[str]:
        """The lines as they stand."""
        lines, column = [""], 0
        for character in self.getvalue():
            if character == "\n":
                lines, column = [*lines, ""], 0
            elif character == "\r":
                column = 0
            else:
                lines[-1] = lines[-1][:column].ljust(column) + character + lines[-1][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    made = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(module, "_columns", lambda stream: 40)
    monkeypatch.setattr(module, "_EVERY", 1e9)  # drawn by hand below
    return made


def to(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the test itself: between a fixture and its test pytest sets stderr anew."""
    monkeypatch.setattr(sys, "stderr", terminal)


def test_the_line_makes_way_for_others_and_comes_back(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    to(terminal, monkeypatch)
    with Status() as tell:
        stream = tell._stream
        assert stream is not None and sys.stderr is stream
        stream.draw("planning ... 3 s")
        assert terminal.screen() == ["planning ... 3 s"]
        print("a warning", file=sys.stderr)
        assert terminal.screen() == ["a warning", ""]
        stream.draw("planning ... 4 s")
        sys.stderr.write("\r10% of a download")  # somebody's bar: no line of ours while it has not ended
        stream.draw("planning ... 5 s")
        assert terminal.screen() == ["a warning", "10% of a download"]
        sys.stderr.writelines(["\r99% of a download", "\n"])
        stream.draw("planning ... 16 s")
        stream.draw("done")  # a shorter one leaves nothing of the longer one
        assert terminal.screen() == ["a warning", "99% of a download", "done"]
        stream.draw("x" * 100)
        assert terminal.screen()[-1] == "x" * 39
    assert sys.stderr is terminal
    assert terminal.screen() == ["a warning", "99% of a download", ""]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_or_an_interrupt_leaves_no_line(
    terminal: Terminal, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    to(terminal, monkeypatch)
    with pytest.raises(error), Status() as tell:
        assert tell._stream is not None
        tell._stream.draw("planning")
        raise error
    assert terminal.screen() == [""] and sys.stderr is terminal


def test_the_thread_draws_what_is_told(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    to(terminal, monkeypatch)
    monkeypatch.setattr(module, "_EVERY", 0.001)
    terminal.awaited = "getting the weights of a b ..."
    with Status() as tell:
        tell("getting the weights of a\nb")
        assert terminal.came.wait(60)
    assert terminal.screen() == [""]


@pytest.mark.parametrize("shown", [True, False])
def test_a_pipe_gets_what_others_write_and_no_control_characters(monkeypatch: pytest.MonkeyPatch, shown: bool) -> None:
    monkeypatch.setattr(module, "_EVERY", 0.001)
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with Status(shown=shown) as tell:
        tell("planning")
        print("a note", file=sys.stderr)
        sys.stderr.write("\r 10%\x1b[K")
        sys.stderr.flush()
        assert pipe.getvalue() == "a note\n"
        sys.stderr.write("\r100%|##|\n")
        sys.stderr.write("\x1b[1;31mred\x1b[0m, without an end")
    assert pipe.getvalue() == "a note\n100%|##|\nred, without an end\n"


def test_the_bar_of_a_library_is_one_plain_line_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm")
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with Status():
        for _ in tqdm.tqdm(range(5), mininterval=0):
            pass
    assert pipe.getvalue().count("\n") == 1 and "5/5" in pipe.getvalue()
    assert not set(pipe.getvalue()) & {"\r", "\x1b"}


def test_no_line_where_none_is_wanted_or_possible(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    to(terminal, monkeypatch)
    with Status(shown=False) as tell:
        assert tell._thread is None
    monkeypatch.setenv("TERM", "dumb")
    with Status() as tell:
        assert tell._thread is None
    monkeypatch.setattr(sys, "stderr", None)
    with Status() as tell:
        tell("planning")
    assert sys.stderr is None and terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("plain", "plain"),
        ("\ttab", "\ttab"),
        ("a\rb", "b"),
        ("over\r", "over"),
        ("\r\x1b[K", ""),
        ("\x1b[1mbold\x1b[0m \x1b]0;title\x07text", "bold text"),
        ("50%\r\x1b[A100%\x07", "100%"),
    ],
)
def test_what_is_left_of_a_line(written: str, seen: str) -> None:
    assert plain(written) == seen


def test_lengths_of_time() -> None:
    assert [lasting(seconds) for seconds in (0, 59, 60, 125)] == ["0 s", "59 s", "1 min 0 s", "2 min 5 s"]


def test_the_command_says_what_it_does_and_leaves_nothing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to(terminal, monkeypatch)
    monkeypatch.setattr(module, "_EVERY", 0.001)
    monkeypatch.chdir(tmp_path)
    terminal.awaited = "building factory:own_slow:make"
    (tmp_path / "own_slow.py").write_text(
        "import sys\nfrom torch import nn\n"
        "def make():\n"
        "    assert sys.stderr.stream.came.wait(60)  # until the line is there\n"
        "    print('own words')\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())\n"
    )
    assert main(["--model", "own_slow:make", "--input-size", "3", "16", "16", "--plan-only"]) == 0
    assert terminal.screen() == ["own words", ""]
    assert capsys.readouterr().out.startswith("factory:own_slow:make at 3x16x16")
