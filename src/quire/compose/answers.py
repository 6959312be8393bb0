"""How a model writes calls of tools and reasoning: seen from its chat template, unless an argument says so."""

from quire.config import EngineArgs
from quire.errors import ConfigurationError, InvalidRequestError
from quire.outputs import Decision
from quire.text.parsers.answer import AnswerFormat
from quire.text.parsers.choose import choose
from quire.text.tokenizer import Tokenizer


def answer_format(args: EngineArgs, tokenizer: Tokenizer) -> AnswerFormat:
    """The format of answers.

    Raises:
        ConfigurationError: an argument names one that is not known.
    """
    special = tokenizer.special_tokens
    try:
        return choose(tokenizer.tools_template, special, args.tool_call_parser, args.reasoning_parser)
    except InvalidRequestError as error:
        raise ConfigurationError(error.message, field=error.param) from error


def answer_decisions(answers: AnswerFormat) -> list[Decision]:
    """What was chosen, and why."""
    return [Decision("answers", f"{answers.name}, reasoning {answers.reasoning_name}", answers.reason)]
