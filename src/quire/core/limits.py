"""What a scheduler may hand out."""

from dataclasses import dataclass, fields

from quire.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What a scheduler may hand out. Raises ConfigurationError when a longest request could never finish."""

    max_num_seqs: int
    """Rows: requests that run at one time."""
    max_num_batched_tokens: int
    """Budget: tokens computed in one step."""
    max_model_len: int
    block_size: int
    num_blocks: int
    soft_block_limit: int = 2**62
    """Blocks that may have memory before the prefix cache evicts: see `quire.core.block_pool`."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            if getattr(self, limit.name) < 1:
                raise ConfigurationError(f"{limit.name} must be at least 1", field=limit.name)
        num_tokens = self.num_blocks * self.block_size
        if num_tokens < self.max_model_len:
            raise ConfigurationError(
                f"the cache holds {num_tokens} tokens ({self.num_blocks} blocks of {self.block_size}), "
                f"less than max_model_len {self.max_model_len}",
                field="max_model_len",
            )
