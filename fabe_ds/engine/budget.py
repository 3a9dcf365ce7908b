"""What a run may spend, and never more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabe_ds.config.sections import BudgetSettings
from fabe_ds.config.yaml_file import read_yaml
from fabe_ds.errors import UsageError, reason
from fabe_ds.request import Completion, Request

_TURN_TOKENS = 16  # what a chat template adds to a turn, at most
_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """Of a million tokens, in whatever currency the cap is in."""

    prompt: float
    completion: float

    def cost(self, prompt: int, completion: int) -> float:
        """What so many tokens cost."""
        return (prompt * self.prompt + completion * self.completion) / _MILLION


def read_price(file: Path | None, model: str) -> Price:
    """The model's price in a YAML file of `model: {prompt: ..., completion: ...}`.

    Raises: UsageError. Where no price is given there is none to assume.
    """
    if file is None:
        raise UsageError("--max-cost needs --prices, a YAML file of the models' prices")
    try:
        prices: Any = read_yaml(file)
        price = Price(float(prices[model]["prompt"]), float(prices[model]["completion"]))
        if not (0 <= price.prompt < math.inf and 0 <= price.completion < math.inf):
            raise ValueError("a price that is none")
        return price
    except OSError as error:
        raise UsageError(f"--prices {file}: {reason(error)}") from None
    except (KeyError, TypeError, ValueError):
        raise UsageError(
            f"--prices {file}: no price of {model!r}; write `{model}: {{prompt: 0.15, "
            "completion: 0.60}`, per million tokens"
        ) from None


def price_of(settings: BudgetSettings, model: str | None) -> Price | None:
    """The price of a model. Raises: UsageError where there is a cap on costs and no price."""
    if settings.max_cost is None and settings.prices is None:
        return None
    return read_price(settings.prices, model or "")


def budget_of(settings: BudgetSettings, model: str | None) -> Budget:
    """What may be spent. Raises: UsageError where there is a cap on costs and no price."""
    caps = (settings.max_requests, settings.max_tokens_total, settings.max_cost)
    return Budget(*caps, price_of(settings, model))


class Budget:
    """Caps on requests, tokens and cost. A request is let go only where the most that it can take
    is left, so no cap is ever passed; what it really took is booked when its answer is there."""

    def __init__(
        self,
        requests: int | None = None,
        tokens: int | None = None,
        cost: float | None = None,
        price: Price | None = None,
    ) -> None:
        self._caps = {"--max-requests": requests, "--max-tokens-total": tokens, "--max-cost": cost}
        self._price = price or Price(0.0, 0.0)
        self._spent = dict.fromkeys(self._caps, 0.0)

    def at(self, price: Price | None) -> Budget:
        """The same budget for another model's price: what one takes, the other lacks."""
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
        elif completion.completion_tokens is None or completion.prompt_tokens is None:
            self._book(self._most(request), 1)
        else:
            amounts = self._amounts(completion.prompt_tokens, completion.completion_tokens)
            self._book(amounts, 1)

    def _book(self, amounts: dict[str, float], sign: int) -> None:
        for name, amount in amounts.items():
            self._spent[name] += sign * amount

    def _most(self, request: Request) -> dict[str, float]:
        turns = request.messages
        # A token is a byte at least.
        prompt = sum(len(turn["content"].encode()) + _TURN_TOKENS for turn in turns) + _TURN_TOKENS
        return self._amounts(prompt, request.sampling.max_new_tokens)

    def _amounts(self, prompt: int, completion: int) -> dict[str, float]:
        cost = self._price.cost(prompt, completion)
        return {"--max-requests": 1, "--max-tokens-total": prompt + completion, "--max-cost": cost}
