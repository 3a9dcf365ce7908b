"""What servers teach of how they want to be asked: learned from a refusal, kept, said once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fabe_ds.config.sections import PolicySettings
from fabe_ds.engine.server_errors import ServerError
from fabe_ds.engine.verdict import Verdict
from fabe_ds.providers.forms import FORMS, IN_PROMPT, refused_form
from fabe_ds.providers.http import STREAM, TIER, HttpProvider, refused_parameter
from fabe_ds.request import Request
from fabe_ds.store.completions import Completions

log = logging.getLogger(__name__)

_PARAMETER_STATUSES = (400, 422)


class Lessons:
    """Writes bodies for one endpoint and model in the way that it has been found to want them."""

    def __init__(
        self, provider: HttpProvider, policy: PolicySettings, memory: Completions | None
    ) -> None:
        """`memory` keeps, for later runs, what was learned."""
        self._provider, self._policy, self._memory = provider, policy, memory
        self._endpoint = (str(provider.address), provider.endpoint.model)
        self.has_answered = False
        """Whether the server took the parameters for a record of this run, so that what the user
        asked for is not what is wrong."""
        self._learned = {} if memory is None else dict(memory.learned(*self._endpoint))

    def __contains__(self, name: str) -> bool:
        return bool(self._learned.get(name))

    def use(self, name: str, value: str | None) -> None:
        """Takes a lesson for this process, or (None) forgets one."""
        if value is None:
            self._learned.pop(name, None)
        else:
            self._learned[name] = value

    def remember(self, name: str, value: str) -> None:
        """Keeps a lesson for later runs too."""
        self._learned[name] = value
        if self._memory is not None:
            self._memory.learn(*self._endpoint, name, value)

    @property
    def known(self) -> dict[str, str]:
        """What is known by now."""
        return dict(self._learned)

    def written(
        self, request: Request, known: Mapping[str, str] | None = None
    ) -> Mapping[str, Any]:
        """The body as it goes out, or as it would where that is `known`."""
        learned = self._learned if known is None else known
        body = self._provider.sent(self._provider.asked(request), learned)
        tier = self._policy.service_tier
        return body if tier is None else {**body, TIER: tier}

    def learn(self, lesson: Mapping[str, str], why: str) -> None:
        """Sends bodies in another way from now on, and in later runs."""
        for name, value in lesson.items():
            if self._learned.get(name) != value:
                self.remember(name, value)
                log.info("%s: %s (%s)", self._provider.address, _in_words(name, value), why)

    def judged(
        self,
        verdict: Verdict,
        status: int,
        error: ServerError,
        request: Request,
        sent: Mapping[str, Any],
    ) -> Verdict:
        """The verdict on a body that was sent, with how to send it instead where a parameter of it
        is refused."""
        name = refused_form(sent, status, error.parameter, error.message)
        is_form = name is not None
        if name is None:
            if verdict.kind not in ("rejected", "server") or status not in _PARAMETER_STATUSES:
                return verdict
            name = self._provider.refused(sent, error.parameter, error.message)
            name = name or refused_parameter(sent, error.parameter, error.codes, error.message)
        # A record may speak of a parameter: behind an answer, the server has to name it by itself.
        told = error.parameter is not None and not is_form
        if name is None or (self.has_answered and not told):
            return verdict
        # What the user asked for is for the user to change.
        asked_for = name in self._provider.endpoint.given_params
        asked_for = asked_for or (name == STREAM and self._policy.stream != "auto")
        asked_for = asked_for or name == TIER
        lesson = None if asked_for else self._provider.instead(name, sent, error.message)
        helps = (
            lesson is not None
            and name not in self._learned.values()
            and self.written(request, self.known | dict([lesson])) != sent
        )
        if lesson is not None and helps:
            return replace(verdict, action="retry", lesson=dict([lesson]))
        if self.has_answered:
            return verdict
        message = f"the server does not take the parameter {name} ({verdict.message})"
        return Verdict("stop", "parameter", message, refused=True)


def _in_words(name: str, value: str) -> str:
    if value == IN_PROMPT:
        what = "no JSON schema" if name in FORMS else "not this JSON schema"
        return f"it takes {what}, so that goes into the prompt, and answers are checked"
    if name == STREAM:
        return "it wants to stream its answers" if value == "true" else "it knows no stream"
    return f"{name} goes as {value}" if value else f"it takes no {name}, so none is sent"
