"""`quire serve`: a model over HTTP, in the words of OpenAI's API, Anthropic's and Ollama's."""

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli import banner, engines, model_path, sampling, serve_models
from quire.cli.arguments import add_engine, engine_values
from quire.config import EngineArgs, bytes_of
from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from quire.engine.async_engine import AsyncEngine
    from quire.engine.front import ServedEngine
    from quire.server.http.cors import Cors
    from quire.server.http.limits import Limits
    from quire.server.http.listen import Listener
    from quire.server.http.models import ServedModels
    from quire.server.http.stored import Store

EXAMPLES = """examples:
  quire serve
  quire serve DIR --port 8000 --served-model-name mine --api-key SECRET
  quire serve SMALL LARGE --served-model-name small large
  curl http://127.0.0.1:8000/v1/completions \\
    -H 'Content-Type: application/json' -d '{"prompt": "Hello", "max_tokens": 9}'

Every flag may stand in a file (--config, or QUIRE_CONFIG) or in the environment: --port is QUIRE_PORT. The command line
goes before the environment, that before the file. Of several models each computes in a process of its own, and requests
choose by `model`; in the file they are entries of `models:`, with settings of their own (docs/guide/several.md).

SIGTERM or Ctrl-C: running requests finish first (--shutdown-timeout); a second one leaves at once."""
OLLAMA_PORT = 11434
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_DIGITS = 640
"""Of a whole number in a body, the fewest that Python can be held to. Its own 4,300 take a time that grows with their
square: a body full of them would hold all other requests for half a second."""

SWITCH_SECONDS = 0.001
"""For which a thread keeps the interpreter while another asks for it. After each read and write the event loop asks
again, and threads that tokenise or render would make it wait Python's 5 ms each time."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    flag = parser.add_argument_group("server").add_argument
    text = (
        "flags from a file: `port: 8000` on a line, and `models:`; each is QUIRE_PORT and so on in the environment too"
    )
    flag("--config", metavar="FILE", help=text)
    flag("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    flag("--port", type=int, help="0 takes a free one (default: 8000; 11434 with --ollama)")
    flag("--ui-port", type=int, metavar="PORT", help="where alone the live view answers (/ui); left out: at --port")
    flag("--ollama", action="store_true", help="listen where Ollama's clients look for it (its API is there anyhow)")
    text = "take the flags and the environment of TGI's launcher too (MODEL_ID, PORT ...): docs/guide/tgi.md"
    flag("--tgi", action="store_true", help=text)
    flag(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names for clients; the directory's name; of several models one for each",
    )
    text = "every route but the probes then needs it; may be repeated, and each key has a prefix cache of its own"
    flag("--api-key", action="append", default=[], metavar="KEY", help=text)
    text = "a limit on requests, such as body_bytes=16MiB; docs/guide/limits.md lists them"
    flag("--limit", action="append", default=[], metavar="NAME=VALUE", help=text)
    text = "more keys, one on a line, with a weight behind it if it is not 1: keys share the engine by weight"
    flag("--api-key-file", metavar="FILE", help=text)
    text = "requests may bring a chat_template; one may take a second of a thread that all share"
    flag("--trust-request-chat-template", action="store_true", help=text)
    text = "usage tells how many prompt tokens were cached; yes, unless keys share the prefix cache"
    flag("--enable-prompt-tokens-details", action=argparse.BooleanOptionalAction, help=text)
    text = "one prefix cache for all keys: faster, but its hits can be timed"
    flag("--share-prefix-cache", action="store_true", help=text)
    text = "seconds for running requests to finish (default: 30)"
    flag("--shutdown-timeout", type=float, default=30.0, metavar="S", help=text)
    _add_store(parser.add_argument_group("what is kept between requests").add_argument)
    _add_cors(parser.add_argument_group("pages in a browser (CORS)").add_argument)
    _add_observability(parser.add_argument_group("observability").add_argument)
    engines.add_quiet(parser)
    add_engine(parser, positional_model=True, several=True)


def _add_store(flag: Callable[..., Any]) -> None:
    """Responses, conversations, files and batches."""
    text = "where responses, conversations, files and batches are kept, and batches go on from after a restart; left "
    flag("--state-dir", metavar="DIR", help=text + "out: in memory, until the server stops")
    flag("--store-bytes", default="1GiB", metavar="SIZE", help="of what is kept at most (default: 1GiB)")
    flag("--store-days", type=int, default=30, metavar="N", help="after which it is forgotten (default: 30)")


def _store(options: argparse.Namespace) -> "Store | None":
    if find_spec("quire.server.store") is None:
        if options.state_dir is not None:
            text = "state_dir needs the package quire.server.store, which this installation lacks"
            raise ConfigurationError(text, field="state_dir")
        return None
    from quire.server.store.database import SqliteStore

    if not 1 <= options.store_days <= 36500:
        raise ConfigurationError("store_days must be between 1 and 36500", field="store_days")
    most, directory = bytes_of("store_bytes", options.store_bytes), options.state_dir
    if most < 2**20:
        raise ConfigurationError("store_bytes must be at least 1MiB", field="store_bytes")
    path = None if directory is None else Path(directory)
    return SqliteStore(path, most_bytes=most, days=options.store_days)


def _add_cors(flag: Callable[..., Any]) -> None:
    """Who may use the server from a page."""
    text = "origins whose pages may use the server: https://app.example, or '*' for all; left out: none"
    flag("--allowed-origins", nargs="+", default=[], metavar="ORIGIN", help=text)
    flag("--allowed-methods", nargs="+", default=["*"], metavar="NAME", help="methods that they may use (default: *)")
    flag("--allowed-headers", nargs="+", default=["*"], metavar="NAME", help="headers that they may send (default: *)")
    text = "names that clients know the server by, besides addresses and localhost ('*': any); left out: any, but for "
    flag(
        "--allowed-hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help=text + "a server of this machine alone without keys",
    )
    flag("--allow-credentials", action="store_true", help="they may send cookies and the like, for a proxy in front")


def _cors(options: argparse.Namespace) -> "Cors":
    from quire.server.http.cors import Cors, listed

    is_private = options.host in LOOPBACK and not (options.api_key or options.api_key_file)

    return Cors(
        listed(options.allowed_origins, "allowed_origins"),
        listed(options.allowed_methods, "allowed_methods"),
        listed(options.allowed_headers, "allowed_headers"),
        options.allow_credentials,
        tuple(options.allowed_hosts) if options.allowed_hosts or is_private else ("*",),
    )


def _add_observability(flag: Callable[..., Any]) -> None:
    """What operators see."""
    text = "opens `quire explain`; without it, that answers to this machine alone and only if callers need no key"
    flag("--admin-api-key", metavar="KEY", help=text)
    text = "/metrics answers to everyone; without it, where callers need a key, to the admin key alone"
    flag("--metrics-open", action="store_true", help=text)
    text = "send spans of requests there (OTLP/HTTP: http://host:4318)"
    flag("--otlp-traces-endpoint", metavar="URL", help=text)
    flag("--enable-log-requests", action="store_true", help="log sizes and times of each request")
    text = "one line or one JSON object a record"
    flag("--log-format", default="text", choices=("text", "json"), help=text)
    text = "before the colon of metrics' names; vllm suits its boards"
    flag("--metrics-prefix", default="quire", metavar="NAME", help=text)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from quire.compose.served import begin
    from quire.server.http.listen import bind, raise_descriptors
    from quire.server.http.models import check_names

    port = options.port if options.port is not None else OLLAMA_PORT if options.ollama else 8000
    _check_ports(port, options.ui_port)
    if not 0 <= options.shutdown_timeout < 86400:
        raise ConfigurationError("shutdown_timeout must be between 0 and 86400 seconds", field="shutdown_timeout")
    several = serve_models.plan_of(options)
    args = EngineArgs.from_mapping({"core_process": True, **engine_values(options)})
    if several is None:
        check_names(options.served_model_name or [engines.model_name(args)])
    cors = _cors(options)
    sys.setswitchinterval(SWITCH_SECONDS)
    wanted = {"--port": port, "--ui-port": options.ui_port}
    listeners = [bind(options.host, one, flag) for flag, one in wanted.items() if one is not None]
    if several is None:
        model_path.check(args.model)
    sys.set_int_max_str_digits(MAX_DIGITS)
    halves = [begin(args)] if several is None else serve_models.begin_all(several)
    # While the core starts: what follows takes a third of a second to import.
    from quire.server.doors.all import DOORS  # noqa: F401 -- imported while the core starts
    from quire.server.http.access import configure_logs
    from quire.server.http.keys import read_keys
    from quire.server.http.limits import TRUSTED_TEMPLATE_CHARACTERS, Limits

    trusted = {"chat_template_characters": TRUSTED_TEMPLATE_CHARACTERS} if options.trust_request_chat_template else {}
    all_args = [args] if several is None else [one.args for one in several.models]
    limits = Limits().for_queue(sum(one.max_num_seqs + one.max_num_queued_reqs for one in all_args))
    limits = limits.with_values({**trusted, **_limit_values(options.limit)}).within(raise_descriptors())
    keys = ({} if options.api_key_file is None else read_keys(options.api_key_file)) | dict.fromkeys(options.api_key, 1)
    configure_logs(options.log_format, requests=options.enable_log_requests)
    host = f"[{options.host}]" if ":" in options.host else options.host
    ports = [one.getsockname()[1] for one in listeners]
    address, *views = (f"http://{host}:{one}" for one in ports)
    ready = "; ".join([f"ready on {address}/v1", *(f"live view on {one}/ui" for one in views)])
    if not views and not options.quiet:
        ready += f"\nlive view: {address}/ui"
    make = partial(_application, options, limits=limits, keys=keys, cors=cors, view_ports=ports[1:])
    if options.host not in LOOPBACK and not keys:
        _say(f"warning: every client that reaches {address} may use it; --api-key asks for a key")
    try:
        if several is None:
            return _serve_one(options, args, halves[0], make, listeners, ready)
        return _serve_several(options, several, halves, make, listeners, ready)
    finally:
        for one in listeners:
            one.close()


def _serve_one(
    options: argparse.Namespace,
    args: EngineArgs,
    finish: "Callable[[], ServedEngine]",
    make: "Callable[..., Starlette]",
    listeners: "Sequence[Listener]",
    ready: str,
) -> int:
    """Listen once the model is there."""
    from quire.engine.async_engine import AsyncEngine
    from quire.server.http.serve import GracefulServer

    engine, name = AsyncEngine(finish()), engines.model_name(args)
    banner.show(name, [*engine.decisions, *sampling.resolve({}, engine.stated_sampling)[1]], quiet=options.quiet)
    try:
        app = make(
            engine,
            served_model_name=options.served_model_name or name,
            model_names=[] if options.served_model_name else [name, *([] if args.model is None else [args.model])],
        )
        server = GracefulServer(app, drain_s=options.shutdown_timeout, on_ready=lambda: _say(ready))
        gc.freeze()  # a full collection, which stops the loop, then walks over none of what a start makes
        server.run([*listeners])
    finally:
        engine.close()
    return 0


def _check_ports(port: int, ui_port: int | None) -> None:
    for name, one in (("port", port), ("ui_port", ui_port or 0)):
        if not 0 <= one < 65536:
            raise ConfigurationError(f"{name} must be between 0 and 65535, got {one}", field=name)
    if ui_port and ui_port == port:
        raise ConfigurationError(f"ui_port must be another port than {port}, where the server is", field="ui_port")


def _serve_several(
    options: argparse.Namespace,
    plan: serve_models.Plan,
    halves: "Sequence[Callable[[], ServedEngine]]",
    make: "Callable[..., Starlette]",
    listeners: "Sequence[Listener]",
    ready: str,
) -> int:
    """Listen at once: each model answers when it is there."""
    from quire.server.http.models import ServedModel, ServedModels
    from quire.server.http.serve import GracefulServer

    models = ServedModels([ServedModel(one.names, one.accepted) for one in plan.models])
    app = make(models)

    def settled(is_any: bool) -> None:
        if is_any:
            _say(ready)
        else:
            server.should_exit = True  # nothing can be served

    loading = serve_models.Loading(models, halves, quiet=options.quiet, say=_say, settled=settled)

    def listens() -> None:
        _say(f"{ready.splitlines()[0].replace('ready', 'listening', 1)}; loading {plan.shown_names}")
        loading.begin(app)

    server = GracefulServer(app, drain_s=options.shutdown_timeout, on_ready=listens)
    try:
        server.run([*listeners])
    finally:
        for engine in models.engines:
            engine.close()
    return 1 if all(model.failure for model in models) else 0


def _application(
    options: argparse.Namespace,
    engine: "AsyncEngine | ServedModels",
    *,
    limits: "Limits",
    keys: dict[str, int],
    cors: "Cors",
    view_ports: "Sequence[int]",
    **names: Any,
) -> "Starlette":
    """All doors around an engine, or several."""
    from quire.cli.machine_rates import kept_read_rates
    from quire.server.dashboard import view
    from quire.server.doors.all import DOORS
    from quire.server.http.app import Observability, create_app
    from quire.weights.local_models import LocalModels

    return create_app(
        engine,
        apis=DOORS,
        **names,
        api_key=keys,
        observability=Observability(
            options.admin_api_key, options.otlp_traces_endpoint, options.enable_log_requests, options.metrics_open
        ),
        metrics_prefix=options.metrics_prefix,
        show_cached_tokens=options.enable_prompt_tokens_details,
        limits=limits,
        share_prefix_cache=options.share_prefix_cache,
        cors=cors,
        store=_store(options),
        local_models=LocalModels(),
        pages=view(kept_read_rates, *view_ports),
    )


def _limit_values(items: list[str]) -> dict[str, int]:
    values = {}
    for item in items:
        given, _, number = item.partition("=")
        name = given.replace("-", "_")
        if name.endswith("bytes"):
            values[name] = bytes_of("limit", number)
            continue
        if not number.isascii() or not number.isdecimal():
            raise ConfigurationError(f"limit must be NAME=VALUE with a whole number, got {item!r}", field="limit")
        values[name] = int(number[:20])
    return values


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
