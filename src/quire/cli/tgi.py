"""`quire serve --tgi`: the flags and the environment of TGI's launcher as flags of `quire serve`.

A flag goes before its variable (`--max-total-tokens`: MAX_TOTAL_TOKENS). What has no counterpart is said where it could
not change an answer or a limit, and refused by name where it could. Flags of `quire serve` may stand beside them.

Facts: the launcher's own list, of its last release (3.3).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import takewhile

from quire.config import QUANTIZATIONS
from quire.errors import ConfigurationError
from quire.sampling_params import MAX_LOGPROBS, MAX_STOP_STRINGS

BLOCK_SIZE = 16
DEFAULTS = {"--port": "3000", "--metrics-prefix": "tgi"}
"""What differs from `quire serve` where nothing is said. The address does not: 127.0.0.1, until HOSTNAME is one."""


@dataclass(frozen=True, slots=True)
class Taken:
    """An argument that is honoured.

    Args:
        flag: ours.
        shown: what the guide says of it beside the flag.
        write: its value as ours.
    """

    flag: str
    shown: str = ""
    write: Callable[[str], str] = str

    def words(self, value: str) -> list[str]:
        """The same for `quire serve`."""
        return [self.flag, self.write(value)]


@dataclass(frozen=True, slots=True)
class Spoken:
    """An argument whose values are ours under other names, ask for nothing, or are refused."""

    values: Mapping[str, tuple[str, ...]]
    shown: str
    is_switch: bool = False

    def words(self, value: str) -> list[str]:
        """The same for `quire serve`.

        Raises:
            ConfigurationError: a value without a counterpart.
        """
        if value not in self.values:
            raise ConfigurationError(f"{value!r} is not one of {', '.join(self.values)}: {self.shown}")
        return list(self.values[value])


@dataclass(frozen=True, slots=True)
class Within:
    """A bound of TGI's that is fixed here: one that asks for no more is met."""

    most: int

    def words(self, value: str) -> list[str]:
        """None.

        Raises:
            ConfigurationError: it asks for more.
        """
        if not value.isdecimal() or int(value) > self.most:
            raise ConfigurationError(f"it is fixed at {self.most} here, got {value!r}")
        return []


@dataclass(frozen=True, slots=True)
class Needless:
    """An argument that changes no answer and no limit here."""

    why: str
    is_switch: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """An argument that is not honoured."""

    why: str
    neutral: tuple[str, ...] = ()
    is_switch: bool = False


Rule = Taken | Spoken | Within | Needless | Refused


def _limit(name: str, shown: str) -> Taken:
    return Taken("--limit", f"{name}: {shown}", lambda value: f"{name}={value}")


def _blocks(value: str) -> str:
    if not value.isdecimal():
        raise ConfigurationError(f"it must be a whole number, got {value!r}")
    return str(-(-int(value) // BLOCK_SIZE))


_NOTHING: tuple[str, ...] = ()
_QUANTIZE = {
    **dict.fromkeys(("awq", "gptq", "marlin", "compressed-tensors"), _NOTHING),
    **dict.fromkeys(("bitsandbytes", "eetq"), ("--quantization", "int8")),
    **dict.fromkeys(("bitsandbytes-nf4", "bitsandbytes-fp4"), ("--quantization", "int4")),
    **{name: ("--quantization", name) for name in QUANTIZATIONS},
}
_CACHE = {
    "auto": _NOTHING,
    "fp8_e4m3fn": ("--kv-cache-dtype", "fp8"),
    **{name: ("--kv-cache-dtype", name) for name in ("fp8", "int8")},
}
_ONE_PROCESS = "one process computes in this version"
_ROPE = "the model's own config.json says how positions are scaled"
_SCHEDULED = "requests join and leave a batch at each step"
TABLE: dict[str, Rule] = {
    "--model-id": Taken("--model"),
    "--revision": Taken("--revision"),
    "--quantize": Spoken(_QUANTIZE, "a checkpoint's own format is seen; others become one of ours"),
    "--dtype": Taken("--dtype"),
    "--max-input-tokens": _limit("prompt_tokens", "of every door"),
    "--max-input-length": _limit("prompt_tokens", "the older name"),
    "--max-total-tokens": Taken("--max-model-len"),
    "--max-batch-prefill-tokens": Taken("--max-num-batched-tokens"),
    "--max-batch-total-tokens": Taken("--num-gpu-blocks-override", f"in blocks of {BLOCK_SIZE} tokens", _blocks),
    "--max-batch-size": Taken("--max-num-seqs"),
    "--max-concurrent-requests": Taken("--max-num-queued-reqs"),
    "--max-best-of": _limit("sequences", "n of other doors too"),
    "--max-client-batch-size": _limit("prompts", "of one request"),
    "--payload-limit": _limit("body_bytes", "of one request"),
    "--max-stop-sequences": Within(MAX_STOP_STRINGS),
    "--max-top-n-tokens": Within(MAX_LOGPROBS),
    "--hostname": Taken("--host"),
    "--port": Taken("--port"),
    "--cuda-memory-fraction": Taken("--gpu-memory-utilization"),
    "--json-output": Spoken({"true": ("--log-format", "json"), "false": ()}, "--log-format json", is_switch=True),
    "--otlp-endpoint": Taken("--otlp-traces-endpoint"),
    "--cors-allow-origin": Taken("--allowed-origins"),
    "--api-key": Taken("--api-key"),
    "--graceful-termination-timeout": Taken("--shutdown-timeout"),
    "--cuda-graphs": Spoken({"0": ("--enforce-eager",)}, "0 turns them off; sizes are chosen from the batch"),
    "--num-shard": Taken("--tensor-parallel-size"),
    "--sharded": Refused(_ONE_PROCESS, ("false",)),
    "--speculate": Refused("drafts are not in this version", ("0",)),
    "--kv-cache-dtype": Spoken(_CACHE, "8 bits have a scale for each head and token"),
    "--trust-remote-code": Refused("no code of a model's repository is run", ("false",), is_switch=True),
    "--rope-scaling": Refused(_ROPE),
    "--rope-factor": Refused(_ROPE),
    "--lora-adapters": Refused("adapters are not served in this version"),
    "--tokenizer-config-path": Refused("the template is the model's own"),
    "--disable-grammar-support": Refused("grammars are always there", ("false",), is_switch=True),
    "--watermark-gamma": Refused("answers are not watermarked"),
    "--watermark-delta": Refused("answers are not watermarked"),
    "--huggingface-hub-cache": Refused("set HF_HUB_CACHE in the environment"),
    "--weights-cache-override": Refused("set HF_HUB_CACHE in the environment"),
    "--otlp-service-name": Refused("spans carry the model's name"),
    "--prometheus-port": Refused("metrics are at /metrics of the server's own port"),
    "--env": Refused("`quire doctor` says what this machine offers", ("false",), is_switch=True),
    "--validation-workers": Needless("texts are tokenised by as many threads as there is work for"),
    "--waiting-served-ratio": Needless(_SCHEDULED),
    "--max-waiting-tokens": Needless(_SCHEDULED),
    "--shard-uds-path": Needless(_ONE_PROCESS),
    "--master-addr": Needless(_ONE_PROCESS),
    "--master-port": Needless(_ONE_PROCESS),
    "--disable-custom-kernels": Needless("kernels are chosen by what the machine offers", is_switch=True),
    "--enable-prefill-logprobs": Needless("decoder_input_details has them always", is_switch=True),
    "--usage-stats": Needless("nothing is reported to anyone"),
    "--disable-usage-stats": Needless("nothing is reported to anyone", is_switch=True),
}
NOT_READ = {"HUGGINGFACE_HUB_CACHE", "ENV", "MASTER_ADDR", "MASTER_PORT"}
"""What the hub's own library honours, and what other programs set for themselves."""


def translated(words: Sequence[str], environment: Mapping[str, str], say: Callable[[str], None]) -> list[str]:
    """A command line of `serve` with `--tgi` as one without it.

    Raises:
        ConfigurationError: what is not honoured, by its name.
    """
    own = list(takewhile(lambda word: word != "--", words))
    given: set[str] = set()
    result: list[str] = []
    for name, value, word in _read(own):
        if name == "--tgi":
            continue
        rule = TABLE.get(name)
        given.add(name)
        result += [word, *([] if value is None else [value])] if rule is None else _words(name, rule, value, say)
    for name, rule in TABLE.items():
        variable = name[2:].replace("-", "_").upper()
        if environment.get(variable) and name not in given and variable not in NOT_READ:
            value = environment[variable]
            if variable == "HOSTNAME" and not _is_address(value):
                say(f"quire: HOSTNAME is {value!r}, which is no address: it is not read")
            else:
                result += _words(variable, rule, value, say)
    for flag, value in DEFAULTS.items():
        own_variable = "QUIRE_" + flag[2:].replace("-", "_").upper()
        if own_variable not in environment and not any(word.partition("=")[0] == flag for word in result):
            result += [flag, value]
    return [*result, *words[len(own) :]]


def _read(words: Sequence[str]) -> Iterator[tuple[str, str | None, str]]:
    """Each word as `(name, value, as it was given)`: values belong to flags of the table alone."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        name = "--port" if name == "-p" else name.replace("_", "-") if name.startswith("--") else name
        rule = TABLE.get(name)
        if rule is None:
            yield name, None, word
        elif equals:
            yield name, value, word
        elif getattr(rule, "is_switch", False):
            yield name, "true", word
        else:
            yield name, rest.pop(0) if rest else None, word


def _words(shown: str, rule: Rule, value: str | None, say: Callable[[str], None]) -> list[str]:
    if value is None:
        raise ConfigurationError(f"{shown} needs a value")
    if isinstance(rule, Needless):
        say(f"quire: {shown} has no counterpart: {rule.why}")
        return []
    if isinstance(rule, Refused):
        if value.lower() not in rule.neutral:
            raise ConfigurationError(f"{shown} is not supported: {rule.why}")
        return []
    try:
        return rule.words(value)
    except ConfigurationError as error:
        raise ConfigurationError(f"{shown}: {error.message}") from error


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
