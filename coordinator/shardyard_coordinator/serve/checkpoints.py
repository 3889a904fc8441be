"""CheckpointService."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection

from shardyard.v1 import checkpoint_service_pb2 as pb
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import CheckpointRecord, JobRecord
from shardyard_coordinator.serve.call import Behaviour, Call
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.tokens import Pages
from shardyard_coordinator.store import checkpoints, encode, jobs


class CheckpointService:
    """What a job can resume from."""

    full_name = "shardyard.v1.CheckpointService"

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return {"GetCheckpoint": self.get, "ListCheckpoints": self.list}

    async def get(self, request: pb.GetCheckpointRequest, _call: Call) -> pb.Checkpoint:
        """Returns one checkpoint."""
        name = self._parts.name("checkpoint", request.name)

        def query(conn: Connection) -> tuple[JobRecord, CheckpointRecord]:
            job = jobs.get_job(conn, name.project, name.id)
            found = checkpoints.get_checkpoint(conn, job.uid, name.attempt, name.step)
            if found is None:
                newest = checkpoints.list_checkpoints(conn, job.uid, limit=5)
                there = ", ".join(f"e{each.epoch}-s{each.step}" for each in newest) or "none yet"
                raise Refused(
                    Reason.CHECKPOINT_NOT_FOUND,
                    f"`{request.name}` is not there; the newest are: {there}; list them with ListCheckpoints",
                    metadata={"available": there},
                )
            return job, found

        return encode.checkpoint_to_proto(*await self._parts.store.read(query))

    async def list(self, request: pb.ListCheckpointsRequest, _call: Call) -> pb.ListCheckpointsResponse:
        """Lists checkpoints, the newest first."""
        name = self._parts.name("job", request.parent)
        pages = Pages(self._parts.tokens, "checkpoints", request)
        after = pages.after()

        def query(conn: Connection) -> tuple[JobRecord, list[CheckpointRecord]]:
            job = jobs.get_job(conn, name.project, name.id)
            begin = None if after is None else (after[0], after[1])
            return job, checkpoints.list_checkpoints(conn, job.uid, after=begin, limit=pages.size + 1)

        job, found = await self._parts.store.read_many(query)
        page, token = pages.fill(
            found, lambda each: encode.checkpoint_to_proto(job, each), lambda each: (each.step, each.epoch)
        )
        return pb.ListCheckpointsResponse(checkpoints=page, next_page_token=token)
