"""The shared printer of the command lines: tables for people, JSON for machines, errors with code and hint.

Results go to stdout, everything else to stderr. Colour is never the only meaning and obeys NO_COLOR and TERM=dumb.
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NoReturn

from identity.errors import BadInput, Bug, RetinueError


class Output(StrEnum):
    """Values of ``-o``."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    YAML = "yaml"


def clean(value: object) -> str:
    """Text safe for a terminal: control characters, bidi overrides and lone surrogates are escaped."""
    text = "-" if value is None else str(value)
    return "".join(
        c if c == " " or unicodedata.category(c) not in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"} else f"\\u{ord(c):04x}"
        for c in text
    )


def plain(data: Any) -> Any:
    """Pydantic models (and containers of them) as JSON-ready values."""
    if hasattr(data, "model_dump"):
        return data.model_dump(mode="json")
    if isinstance(data, Mapping):
        return {str(k): plain(v) for k, v in data.items()}
    if isinstance(data, list | tuple | set | frozenset):
        return [plain(v) for v in data]
    return data


def emit(
    data: Any,
    output: Output | str,
    *,
    columns: Sequence[str] = (),
    rows: Iterable[Sequence[object]] = (),
    human: Callable[[], None] | None = None,
) -> None:
    """Print one result. `human` (or columns and rows) serves the table form, `data` all the others."""
    match Output(output):
        case Output.JSON:
            print(json.dumps(plain(data), indent=2, ensure_ascii=True))
        case Output.JSONL:
            value = plain(data)
            for item in value if isinstance(value, list) else [value]:
                print(json.dumps(item, ensure_ascii=True))
        case Output.YAML:
            import yaml

            print(yaml.safe_dump(plain(data), sort_keys=False), end="")
        case Output.TABLE:
            if human is not None:
                human()
            else:
                table(columns, rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns; widths follow the content. No dependency on a wide terminal: lines may wrap there."""
    cells = [[clean(value) for value in row] for row in rows]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)]
    bold, reset = ("\x1b[1m", "\x1b[0m") if colour(sys.stdout) else ("", "")
    heading = "  ".join(name.upper().ljust(width) for name, width in zip(columns, widths, strict=True)).rstrip()
    print(f"{bold}{heading}{reset}")
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def colour(stream: Any) -> bool:
    """May this stream be coloured?"""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and bool(stream.isatty())


def note(text: str) -> None:
    """Progress or advice for a person, on stderr."""
    print(text, file=sys.stderr)


def fail(error: RetinueError, *, as_json: bool = False) -> NoReturn:
    """Print an error and leave with its exit status."""
    if as_json:
        print(json.dumps({"error": error.as_dict()}, ensure_ascii=True), file=sys.stderr)
    else:
        red, reset = ("\x1b[31m", "\x1b[0m") if colour(sys.stderr) else ("", "")
        print(f"{red}error[{error.code}]{reset}: {clean(error)}", file=sys.stderr)
        if error.hint:
            print(f"hint: {clean(error.hint)}", file=sys.stderr)
    raise SystemExit(error.exit)


def wants_json(argv: Sequence[str]) -> bool:
    """Did the command line ask for machine output? Looked at before parsing, so that usage errors obey it too."""
    if "--json" in argv or any(a in {"-ojson", "-ojsonl", "--output=json", "--output=jsonl"} for a in argv):
        return True
    pairs = zip(argv, argv[1:], strict=False)
    return any(a in {"-o", "--output"} and b in {"json", "jsonl"} for a, b in pairs)


def run_app(app: Callable[..., Any], name: str, *, before: Callable[[], None] | None = None) -> NoReturn:
    """Run a command tree (typer's or click's) and leave with the documented exit status. `before` runs first.

    Its errors are known by their shape, since this package does not depend on either.
    """

    def body() -> None:
        if before is not None:
            before()
        if show_help(app, name, sys.argv[1:]):
            return
        try:
            status = app(prog_name=name, standalone_mode=False)
        except RetinueError:
            raise
        except Exception as e:
            raise _usage(e, name) from None
        if isinstance(status, int) and status:
            sys.exit(status)

    run(body)


def show_help(app: Any, name: str, argv: Sequence[str]) -> bool:
    """Print the help that ``COMMAND... --help`` asks for; False when that is not what `argv` says.

    Done before any parsing, which loads the whole of the argument validation.
    """
    *words, last = argv or [""]
    if last not in {"-h", "--help"} or "--" in words or not hasattr(app, "context_class"):
        return False
    command, context = app, app.context_class(app, info_name=name, **app.context_settings)
    for word in words:
        if not hasattr(command, "get_command"):
            if command.context_settings.get("allow_interspersed_args", True):
                break  # its own arguments
            return False
        command = command.get_command(context, word)
        if command is None:
            return False
        context = command.context_class(command, info_name=word, parent=context, **command.context_settings)
    print(help_text(command, context))
    return True


def help_text(command: Any, context: Any) -> str:
    """The help of one command, with arguments called as they are named and without the types of a programmer."""
    for param in command.params:
        if param.param_type_name == "argument" and param.metavar:
            shown = param.metavar if param.required else f"[{param.metavar.strip('[]')}]"
            param.display_type_rich = lambda **_: None
            param._usage_display_name = lambda shown=shown: shown
    return str(command.get_help(context))


def _usage(error: Exception, name: str) -> BaseException:
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else name
    if type(error).__name__ == "Abort":
        return KeyboardInterrupt()
    if not hasattr(error, "format_message"):
        return error
    if type(error).__name__ == "NoArgsIsHelpError":
        if not wants_json(sys.argv):
            print(error.format_message(), file=sys.stderr)
            return SystemExit(2)
        return BadInput("usage", "a command is missing", hint=f"see: {where} --help")
    return BadInput("usage", error.format_message().replace("Value error, ", ""), hint=f"see: {where} --help")


def _unfit(error: Exception) -> BadInput | None:
    """A word that does not fit the message it was put in (identity.wire) is its user's mistake. Never its value."""
    core = sys.modules.get("pydantic_core")
    if core is None or not isinstance(error, core.ValidationError):
        return None
    first = error.errors(include_input=False, include_url=False)[0]
    return BadInput("usage", f"{'.'.join(map(str, first['loc'])) or 'input'}: {first['msg']}")


def run(main: Callable[[], object]) -> NoReturn:
    """Run a command line's body and map whatever it raises to a message and an exit status.

    RETINUE_DEBUG=1 shows the traceback of a bug.
    """
    as_json = wants_json(sys.argv)
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # here, where a closed pipe can still be told from other ends
    except RetinueError as e:
        fail(e, as_json=as_json)
    except BrokenPipeError:
        _closed_pipe()
    except SystemExit as e:
        if isinstance(e.__context__, BrokenPipeError):  # click's own exit for it
            _closed_pipe()
        raise
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as e:
        if os.environ.get("RETINUE_DEBUG"):
            raise
        fail(
            _unfit(e) or Bug("bug", f"{type(e).__name__}: this is a defect in Retinue", hint="run again with RETINUE_DEBUG=1 and report the trace"),
            as_json=as_json,
        )
    raise SystemExit(0)


def _closed_pipe() -> NoReturn:
    """The reader has what it wanted: leave as a program killed by SIGPIPE does, without words."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(141) from None
