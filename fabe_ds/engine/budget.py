"""What a run may spend, and never more."""

from __future__ import annotations

from fabe_ds.config.sections import BudgetSettings
from fabe_ds.engine.prices import FREE, Price
from fabe_ds.request import Completion, Request

_TURN_TOKENS = 16  # what a chat template adds to a turn, at most


def budget_of(settings: BudgetSettings) -> Budget:
    """What may be spent."""
    return Budget(settings.max_requests, settings.max_tokens_total, settings.max_cost)


class Budget:
    """Caps on requests, tokens and cost. A request is let go only where the most that it can take
    is left, so no cap is ever passed; what it really took is booked when its answer is there."""

    def __init__(
        self,
        requests: int | None = None,
        tokens: int | None = None,
        cost: float | None = None,
        price: Price = FREE,
    ) -> None:
        self._caps = {"--max-requests": requests, "--max-tokens-total": tokens, "--max-cost": cost}
        self._price = price
        self._spent = dict.fromkeys(self._caps, 0.0)

    def at(self, price: Price) -> Budget:
        """The same budget at a model's price: what one takes, another lacks."""
        other = Budget(price=price)
        other._caps, other._spent = self._caps, self._spent
        return other

    @property
    def cost(self) -> float:
        return self._spent["--max-cost"]

    def lacking(self, request: Request) -> str | None:
        """The cap that does not allow the request, or None."""
        most = self._most(request)
        for name, cap in self._caps.items():
            if cap is not None and self._spent[name] + most[name] > cap + 1e-12:
                return f"{name} {cap:g}"
        return None

    def reserve(self, request: Request) -> None:
        self._book(self._most(request), 1)

    def settle(self, request: Request, completion: Completion | None, answered: bool) -> None:
        """Books what a try took: its usage; nothing but the request where the server refused it;
        the most it could where nothing is known."""
        if completion is None and not answered:
            return
        self._book(self._most(request), -1)
        if completion is None:
            self._book(self._amounts(0, 0), 1)
        else:
            self.used(request, completion)

    def used(self, request: Request, completion: Completion) -> None:
        """Books what an answer took that nothing was reserved for."""
        prompt, answer = completion.prompt_tokens, completion.completion_tokens
        if answer is None or prompt is None:
            self._book(self._most(request), 1)
        else:
            self._book(self._amounts(prompt, answer, completion.cached_tokens or 0), 1)

    def _book(self, amounts: dict[str, float], sign: int) -> None:
        for name, amount in amounts.items():
            self._spent[name] += sign * amount

    def _most(self, request: Request) -> dict[str, float]:
        turns = request.messages
        # A token is a byte at least.
        prompt = sum(len(turn["content"].encode()) + _TURN_TOKENS for turn in turns) + _TURN_TOKENS
        return self._amounts(prompt, request.sampling.max_new_tokens)

    def _amounts(self, prompt: int, completion: int, cached: int = 0) -> dict[str, float]:
        cost = self._price.cost(prompt, completion, cached)
        return {"--max-requests": 1, "--max-tokens-total": prompt + completion, "--max-cost": cost}
