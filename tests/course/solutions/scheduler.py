from collections import deque
from collections.abc import Sequence


class Scheduler:
    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.budget = max_num_batched_tokens
        self.lacks: dict[str, int] = {}
        self.waiting: deque[str] = deque()
        self.running: dict[str, None] = {}
        self.plan: dict[str, int] = {}

    def add(self, request_id: str, num_prompt_tokens: int) -> None:
        self.lacks[request_id] = num_prompt_tokens
        self.waiting.append(request_id)

    def schedule(self) -> dict[str, int]:
        plan = {name: 1 for name in self.running if self.lacks[name] == 1}
        left = self.budget - len(plan)
        for name in self.running:
            if name not in plan and left:
                plan[name] = min(self.lacks[name], left)
                left -= plan[name]
        while self.waiting and left and len(self.running) < self.max_num_seqs:
            name = self.waiting.popleft()
            self.running[name] = None
            plan[name] = min(self.lacks[name], left)
            left -= plan[name]
        self.plan = plan
        return plan

    def update(self, sampled: Sequence[str], ended: Sequence[str]) -> None:
        for name, count in self.plan.items():
            self.lacks[name] -= count
        self.plan = {}
        for name in sampled:
            self.lacks[name] += 1
        for name in ended:
            del self.lacks[name]
            if name in self.running:
                del self.running[name]
            else:
                self.waiting.remove(name)
