"""The exception tree.

DecarError                 anything a user can mend; `message` names the thing and the fix
├── EnsembleError          an ensemble directory that cannot be served as it is
├── RequestError           a request that cannot be served as asked (HTTP 400)
├── StartError             the server cannot start (port, memory, engine)
└── TrainingError          a training configuration or data set that cannot be used
"""

import difflib
from collections.abc import Iterable


class DecarError(Exception):
    """A problem the user can mend. Its text is shown as it is, without a traceback."""


class EnsembleError(DecarError):
    """An ensemble directory that cannot be served as it is."""


class RequestError(DecarError):
    """A request that cannot be served as asked.

    Args:
        message: what is wrong and how to mend it.
        param: the request field at fault, e.g. ``"decar.weights"``.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class StartError(DecarError):
    """The server cannot start."""


class TrainingError(DecarError):
    """A training configuration or data set that cannot be used."""


def did_you_mean(word: object, *known: Iterable[str]) -> str:
    """``"; did you mean 'prior'?"`` for a ``word`` near one of ``known``, of which the first with a near one counts;
    nothing for any other."""
    for names in known:
        near = difflib.get_close_matches(str(word), list(names), n=1)
        if near:
            return f"; did you mean {near[0]!r}?"
    return ""
