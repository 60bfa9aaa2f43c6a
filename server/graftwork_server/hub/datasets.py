"""Data sets: their lines in the store, their rows in the database. Blocking."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence

from sqlalchemy import select

from graftwork_server.errors import FailedPrecondition, NotFound
from graftwork_server.hub.database.connection import Database, now
from graftwork_server.hub.database.pages import check_page_size, one_page, page_after
from graftwork_server.hub.database.records import DatasetRecord
from graftwork_server.hub.database.tables import Dataset, Job, microseconds, time_of
from graftwork_server.hub.files.store import Store
from graftwork_server.hub.files.uploads import DatasetUpload
from graftwork_server.hub.publishing import FINAL
from graftwork_server.types import DatasetFormat

_POSITION = re.compile(r"([0-9]{1,17}):(.+)")


class Datasets:
    """All data sets. Storing one and deleting one take turns: the same content may be sent while it is deleted."""

    def __init__(self, database: Database, store: Store) -> None:
        self._database = database
        self._store = store
        self._lock = threading.Lock()

    def store(
        self, received: DatasetUpload, *, display_name: str, format: DatasetFormat, row_count: int
    ) -> DatasetRecord:
        """Makes the bytes of an upload a data set. The same content a second time is the first one."""
        with self._lock:
            path = received.store()
            return self.add(
                path.stem,
                display_name=display_name,
                format=format,
                row_count=row_count,
                size_bytes=received.size_bytes,
            )

    def add(
        self, dataset_id: str, *, display_name: str, format: DatasetFormat, row_count: int, size_bytes: int
    ) -> DatasetRecord:
        """Registers a data set whose lines are in the store."""
        with self._database.write() as session:
            row = session.get(Dataset, dataset_id)
            if row is None:
                row = Dataset(
                    id=dataset_id,
                    display_name=display_name,
                    format=format.value,
                    row_count=row_count,
                    size_bytes=size_bytes,
                    create_time=now(),
                )
                session.add(row)
            return _record(row)

    def get(self, dataset_id: str, field: str = "name") -> DatasetRecord:
        """A data set. Raises NotFound (DATASET_NOT_FOUND)."""
        with self._database.read() as session:
            row = session.get(Dataset, dataset_id)
            if row is None:
                raise dataset_not_found(dataset_id, field)
            return _record(row)

    def list(self, page_size: int = 0, token: str = "") -> tuple[Sequence[DatasetRecord], str]:
        """Data sets, newest first, and the next page's token ("": there is none)."""
        size, before = check_page_size(page_size), page_after("datasets", token, _POSITION)
        query = select(Dataset).order_by(Dataset.create_time.desc(), Dataset.id.desc()).limit(size + 1)
        if before is not None:
            micros, _, dataset_id = before.partition(":")
            time = time_of(int(micros))
            same_time = (Dataset.create_time == time) & (Dataset.id < dataset_id)
            query = query.where((Dataset.create_time < time) | same_time)
        with self._database.read() as session:
            found = [_record(row) for row in session.scalars(query)]
        return one_page("datasets", found, size, _position)

    def ids(self) -> set[str]:
        """Ids of all data sets."""
        with self._database.read() as session:
            return set(session.scalars(select(Dataset.id)))

    def delete(self, dataset_id: str) -> None:
        """Forgets a data set and removes its lines.

        Raises NotFound (DATASET_NOT_FOUND), FailedPrecondition (DATASET_IN_USE) while a job needs it.
        """
        with self._lock:
            with self._database.write(makes_room=True) as session:
                row = session.get(Dataset, dataset_id)
                if row is None:
                    raise dataset_not_found(dataset_id, "name")
                for job in session.scalars(select(Job).where(Job.state.not_in(FINAL))):
                    spec = json.loads(job.spec)
                    if dataset_id in (spec["dataset_id"], spec["validation_dataset_id"]):
                        raise FailedPrecondition(
                            f"job {job.id} needs the data set {dataset_id}; wait for its end, or cancel it",
                            reason="DATASET_IN_USE",
                            field="name",
                        )
                session.delete(row)
            self._store.dataset_path(dataset_id).unlink(missing_ok=True)


def _position(dataset: DatasetRecord) -> str:
    return f"{microseconds(dataset.create_time)}:{dataset.dataset_id}"


def dataset_not_found(dataset_id: str, field: str) -> NotFound:
    """The error for a data set that is not there."""
    return NotFound(
        f"there is no data set {dataset_id[:100]!r}; upload it first", reason="DATASET_NOT_FOUND", field=field
    )


def _record(row: Dataset) -> DatasetRecord:
    return DatasetRecord(
        dataset_id=row.id,
        display_name=row.display_name,
        format=DatasetFormat(row.format),
        row_count=row.row_count,
        size_bytes=row.size_bytes,
        create_time=row.create_time,
    )
