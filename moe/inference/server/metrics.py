"""What a server tells Prometheus of itself."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moe.inference.server.service import Service

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counts of one server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = CollectorRegistry()
        self.requests = Counter("moe_requests", "HTTP requests of completions", ["status"], registry=self._registry)
        self.first_token = Histogram(
            "moe_first_token_seconds", "time to the first token", buckets=SECONDS, registry=self._registry
        )
        self.duration = Histogram(
            "moe_request_seconds", "time to the end of an answer", buckets=SECONDS, registry=self._registry
        )
        self._registry.register(self)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What the engine counts itself."""
        engine = self._service.completions.engine
        counts = engine.statistics
        for name, meaning, value in (
            ("moe_steps", "steps of the engine", counts.steps),
            ("moe_prompt_tokens", "tokens of prompts that were read", counts.prompt_tokens),
            ("moe_shared_prompt_tokens", "tokens of prompts that were in the cache already", counts.shared_tokens),
            ("moe_new_tokens", "tokens written", counts.new_tokens),
            ("moe_guessed_tokens", "tokens guessed", counts.guessed),
            ("moe_accepted_tokens", "guessed tokens that were kept", counts.accepted),
            ("moe_preemptions", "texts that gave up their blocks", counts.preemptions),
        ):
            yield CounterMetricFamily(name, meaning, value)
        pools = [group.pool for group in engine.cache.groups]
        for name, meaning, value in (
            ("moe_open_prompts", "prompts that somebody waits for", self._service.n_open),
            ("moe_running_texts", "texts with blocks in the cache", engine.n_running),
            ("moe_waiting_texts", "texts that wait for blocks", engine.n_waiting),
            ("moe_blocks", "blocks of the cache", sum(pool.n_blocks for pool in pools)),
            ("moe_free_blocks", "blocks that nobody holds", sum(pool.n_free for pool in pools)),
        ):
            yield GaugeMetricFamily(name, meaning, value)
