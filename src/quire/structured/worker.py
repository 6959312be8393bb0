"""The process in which shapes are compiled for the first time: `python -m quire.structured.worker`.

One line of JSON comes in for each job, one goes out. A job that takes too much processor time or memory ends the
process: a signal and a limit of the system do that, whatever the job does meanwhile. See `checker.py`.
"""

import contextlib
import json
import resource
import signal
import sys

from quire.errors import InvalidRequestError
from quire.structured.source import refusal, source_of, validate
from quire.structured_params import StructuredOutputsParams

JOB_CPU_S = 2.0
"""Processor time, not time: a loaded machine refuses no schema that an idle one takes."""
MEMORY_BYTES = 2**30
TOO_MUCH_MEMORY = f"takes more than {MEMORY_BYTES >> 30} GiB of memory to compile"
STACK_BYTES = 2**26
"""llguidance goes from rule to rule of a long grammar."""


def main() -> None:
    """Answer jobs until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the terminal is for the one who asked
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, JOB_CPU_S)
        answer = _answer(line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(line: bytes) -> dict[str, str]:
    params = StructuredOutputsParams(**json.loads(line))
    try:
        source = source_of(params)
        validate(source, params)
    except InvalidRequestError as error:
        return {"error": error.message}
    except MemoryError:
        return {"error": refusal(params.kind, TOO_MUCH_MEMORY).message}
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # "required": 5, "properties": null
        return {"error": refusal(params.kind, f"a keyword has a value of a wrong type: {str(error)[:200]}").message}
    return {"source": source}


if __name__ == "__main__":
    main()
