"""``medvlm VERB``: each verb is one function that reads its arguments and one that does the work.

The work is imported when the verb runs, so ``medvlm show`` loads no torch. Exit status: 0 done, 1 the work failed, 2 bad
input or usage, 130 interrupted. What goes wrong is one line on standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import __version__
from .errors import MedVLMError

FAILED = {"CANNOT_WRITE"}
"""Codes that mean the input was good and the work failed (exit status 1)."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def add_study(parser: Parser, many: bool = False) -> None:
    """The arguments that every verb that reads a study has."""
    parser.add_argument("study", nargs="+" if many else None, metavar="STUDY", help="file, folder, zip or DICOMDIR")
    parser.add_argument("--policy", default="strict", choices=("strict", "fill", "resample"), help="what to do about gaps and uneven slices (default: strict, refuse)")
    parser.add_argument("--study", dest="study_id", metavar="ID", help="which study, where there are several")
    parser.add_argument("--modality", help="what kind of image it is, where the file does not say: xray, ct, mr, fundus, ...")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def read_study(args: argparse.Namespace, source: Any = None):
    """The study that the arguments of :func:`add_study` name."""
    from .imaging.study import read

    return read(args.study if source is None else source, args.policy, modality=args.modality, study=args.study_id)


def show_arguments(parser: Parser) -> None:
    add_study(parser)


def show(args: argparse.Namespace) -> int:
    """what is in a study: images, geometry, warnings"""
    from .imaging import show

    study = read_study(args)
    if args.json:
        print(json.dumps(show.summary(study), allow_nan=False))
    else:
        show.table(study)
    return 0


VERBS: dict[str, tuple[Callable[[Parser], None], Callable[[argparse.Namespace], int]]] = {
    "show": (show_arguments, show),
}


def parser() -> Parser:
    top = Parser(prog="medvlm", description="Medical images and language: read, ask, segment, report, train and score. Research use only.")
    top.add_argument("--version", action="version", version=f"medvlm {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for name, (arguments, work) in VERBS.items():
        about = " ".join((work.__doc__ or "").split())
        verb = verbs.add_parser(name, help=about, description=about[:1].upper() + about[1:] + ".")
        arguments(verb)
        verb.set_defaults(work=work)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and give its exit status."""
    try:
        args = parser().parse_args(argv)
        status = args.work(args)
        sys.stdout.flush()
        return status
    except SystemExit as e:  # argparse: --help, --version, usage
        return e.code if isinstance(e.code, int) else 2
    except MedVLMError as e:
        return _fail(str(e), 1 if e.code in FAILED else 2)
    except BrokenPipeError:  # the reader has seen enough, as in: medvlm show STUDY | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except MemoryError:
        return _fail("there is not enough memory for this [MEMORY]: close other programs or lower medvlm.imaging.limits", 1)
    except Exception as e:
        if sys.flags.dev_mode:
            raise
        # the text of a foreign error may quote what is inside a patient's file: only its kind and place are said
        return _fail(f"{type(e).__name__} in {_place(e)} [INTERNAL]: a defect in medvlm; python -X dev -m medvlm shows where", 1)


def _place(error: Exception) -> str:
    here, place, step = os.path.dirname(__file__), "an unknown place", error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if file.startswith(here):
            place = f"{os.path.relpath(file, here)}:{step.tb_lineno}"
        step = step.tb_next
    return place


def _fail(line: str, status: int) -> int:
    print(f"medvlm: {line}", file=sys.stderr)
    return status
