"""The health probe that orchestrators know: gRPC's health protocol (``grpc.health.v1.Health``), served and asked.

It says ``SERVING`` or not, for all processes of an end together and for each by name, and nothing else: it may be
asked by whoever reaches it. Flower's own health server always says SERVING, whatever became of the other processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

from fedvfm import errors

Alive = Callable[[], Mapping[str, bool]]
PATIENCE_S = 10.0


@contextlib.contextmanager
def serving(address: str, alive: Alive) -> Iterator[None]:
    """Answer probes at ``address`` while the block runs; not at all if it is empty.

    Args:
        address: ``host:port``, without TLS.
        alive: name of a process -> whether it runs.

    Raises:
        EngineError: if nothing can be bound there.
    """
    if not address:
        yield
        return
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    class Servicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
        """Looks at the processes at each question; a probe that watches is told to ask."""

        def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
            """Of all processes if the question names none."""
            found = alive()
            if request.service and request.service not in found:
                context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
            well = found[request.service] if request.service else all(found.values())
            states = health_pb2.HealthCheckResponse
            return states(status=states.SERVING if well else states.NOT_SERVING)

    server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)], maximum_concurrent_rpcs=16)
    health_pb2_grpc.add_HealthServicer_to_server(Servicer(), server)
    try:
        server.add_insecure_port(address)
    except RuntimeError:
        raise errors.EngineError(
            f"--health {address}: cannot listen there. Give a free host:port of this machine, such as 127.0.0.1:8081"
        ) from None
    server.start()
    try:
        yield
    finally:
        server.stop(1.0).wait()


def ask(address: str, service: str = "", seconds: float = PATIENCE_S) -> bool:
    """Whether who answers at ``address`` is well.

    Raises:
        EngineError: if nobody answers there, or knows no such service.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            found = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=seconds)
        except grpc.RpcError as error:
            raise errors.EngineError(f"health of {address}: {error.code().name.lower().replace('_', ' ')}") from None
    return bool(found.status == health_pb2.HealthCheckResponse.SERVING)
