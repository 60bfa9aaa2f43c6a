"""AdapterService: files in, names out. What is published is whole, fits the base, and stays until it is deleted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from graftwork.v1 import adapters_pb2 as pb
from graftwork.v1.adapters_pb2_grpc import AdapterServiceServicer
from graftwork_server.errors import FailedPrecondition, GraftworkServerError, InvalidArgument
from graftwork_server.front.engine_client import EngineClient
from graftwork_server.front.pins import Pins
from graftwork_server.front.rpc.convert import adapter_message, load_report_message
from graftwork_server.front.rpc.generation.service import text_of
from graftwork_server.front.rpc.streaming import Uploads, check_chunk, first_payload
from graftwork_server.hub.database.records import VersionRecord
from graftwork_server.hub.files.manifest import uploaded_end_tokens
from graftwork_server.hub.files.uploads import ArtifactUpload, UploadFile
from graftwork_server.hub.hub import Hub
from graftwork_server.hub.registry import RequestKey, request_key
from graftwork_server.logs import log_event, note
from graftwork_server.names import check_adapter_id, parse_adapter, parse_adapter_or_version, parse_version
from graftwork_server.process.threads import run_to_end
from graftwork_server.text.strangers.isolated_text import IsolatedTexts

log = logging.getLogger("graftwork.adapters")

Context = grpc.aio.ServicerContext


class AdapterService(AdapterServiceServicer):
    """Adapters of this server's hub, on this server's engine. `max_upload_bytes` is for all files of one upload."""

    def __init__(
        self,
        engine: EngineClient,
        hub: Hub,
        texts: IsolatedTexts,
        pins: Pins,
        max_upload_bytes: int,
        uploads: Uploads,
    ) -> None:
        self._engine = engine
        self._hub = hub
        self._texts = texts
        self._pins = pins
        self._max_upload_bytes = max_upload_bytes
        self._uploads = uploads
        self._unloads: set[asyncio.Task[None]] = set()

    async def CreateAdapter(
        self, request_iterator: AsyncIterator[pb.CreateAdapterRequest], context: Context
    ) -> pb.CreateAdapterResponse:
        """Publishes a version from streamed files."""
        with self._uploads.open(request_iterator) as requests:
            upload = (await first_payload(requests, "upload")).upload
            check_adapter_id(upload.adapter_id, "upload.adapter_id")
            files = [UploadFile(file.name, file.size_bytes, file.sha256) for file in upload.files]
            content = [upload.adapter_id, upload.strategy, upload.new_version, upload.load, files]
            key = request_key("CreateAdapter", upload.request_id, content)
            version = await asyncio.to_thread(self._hub.registry.find_request, key)
            if version is None:
                version = await self._receive(upload, files, key, requests)
                log_event(log, "adapter published", adapter=version.name, strategy=version.strategy)
        note(adapter=version.name)
        report = await self._load(version) if upload.load else None
        return pb.CreateAdapterResponse(adapter=self._message(version), load_report=report)

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        """One adapter."""
        return pb.GetAdapterResponse(adapter=self._message(await self._version(request.name)))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        """Adapters by id, a page at a time."""
        versions, token = await asyncio.to_thread(
            self._hub.registry.list_adapters, request.page_size, request.page_token
        )
        return pb.ListAdaptersResponse(adapters=[self._message(version) for version in versions], next_page_token=token)

    async def ListVersions(self, request: pb.ListVersionsRequest, context: Context) -> pb.ListVersionsResponse:
        """An adapter's versions, newest first, a page at a time."""
        versions, token = await asyncio.to_thread(
            self._hub.registry.list_versions,
            parse_adapter(request.parent, "parent"),
            request.page_size,
            request.page_token,
        )
        return pb.ListVersionsResponse(versions=[self._message(version) for version in versions], next_page_token=token)

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: Context) -> pb.DeleteAdapterResponse:
        """Forgets an adapter; its files and its place on the device go once nobody uses them."""
        versions = await run_to_end(self._hub.delete_adapter, parse_adapter(request.name))
        log_event(log, "adapter deleted", adapter=request.name, versions=len(versions))
        await self._forget(versions)
        return pb.DeleteAdapterResponse(deleted_versions=len(versions))

    async def DeleteVersion(self, request: pb.DeleteVersionRequest, context: Context) -> pb.DeleteVersionResponse:
        """Forgets one version; its files and its place on the device go once nobody uses them."""
        found, number = parse_version(request.name)
        version, newest = await run_to_end(self._hub.delete_version, found, number)
        log_event(log, "version deleted", adapter=version.name, newest_version=newest)
        await self._forget([version])
        return pb.DeleteVersionResponse(newest_version=newest)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:
        """Loads a version beside the base."""
        version = await self._version(request.name)
        report = await self._load(version)
        return pb.LoadAdapterResponse(adapter=self._message(version), load_report=report)

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Context) -> pb.UnloadAdapterResponse:
        """Takes a version off the device once its running requests have ended."""
        version = await self._version(request.name)
        await self._check_not_pinned_elsewhere(version)
        unpinned = version.pinned
        if unpinned:
            version = await self._set_pinned(version, False)
        await self._engine.unload(version.digest)
        return pb.UnloadAdapterResponse(adapter=self._message(version), unpinned=unpinned)

    async def PinAdapter(self, request: pb.PinAdapterRequest, context: Context) -> pb.PinAdapterResponse:
        """Loads a version and keeps it on the device."""
        version = await self._version(request.name)
        report = await self._load(version)
        was_pinned = version.pinned
        version = await self._set_pinned(version, True)
        try:
            await self._load(version)  # if another one took its place before the engine knew of the pin
        except GraftworkServerError:
            await self._set_pinned(version, was_pinned)
            raise
        return pb.PinAdapterResponse(adapter=self._message(version), load_report=report)

    async def UnpinAdapter(self, request: pb.UnpinAdapterRequest, context: Context) -> pb.UnpinAdapterResponse:
        """Lets a version be evicted again."""
        version = await self._set_pinned(await self._version(request.name), False)
        return pb.UnpinAdapterResponse(adapter=self._message(version))

    # ------------------------------------------------------------------------------------------ parts

    async def _forget(self, versions: list[VersionRecord]) -> None:
        """What the engine has of deleted versions goes once nobody uses it."""
        if any(version.pinned for version in versions):
            await self._pins.tell()
        for digest in {version.digest for version in versions}:  # loaded or not: the host may have a copy
            task = asyncio.create_task(self._unload_unless_published(digest))
            self._unloads.add(task)
            task.add_done_callback(self._unloads.discard)

    def _message(self, version: VersionRecord) -> pb.Adapter:
        return adapter_message(version, loaded=version.digest in self._engine.loaded)

    async def _version(self, name: str) -> VersionRecord:
        found, number = parse_adapter_or_version(name)
        version = await asyncio.to_thread(self._hub.registry.get_version, found, number)
        note(adapter=version.name)
        return version

    async def _set_pinned(self, version: VersionRecord, pinned: bool) -> VersionRecord:
        changed = await run_to_end(self._hub.registry.set_pinned, version, pinned)
        await self._pins.tell()
        return changed

    async def _check_not_pinned_elsewhere(self, version: VersionRecord) -> None:
        """What is on the device is known by its files: whoever unloads them does so for all versions that have them."""
        for pinned in await asyncio.to_thread(self._hub.registry.pinned_versions):
            if pinned.digest == version.digest and pinned.name != version.name:
                raise FailedPrecondition(
                    f"{version.name} has the same files as {pinned.name}, which is pinned; unpin that first",
                    reason="ADAPTER_PINNED",
                    field="name",
                )

    async def _receive(
        self,
        upload: pb.AdapterUpload,
        files: list[UploadFile],
        key: RequestKey | None,
        requests: AsyncIterator[pb.CreateAdapterRequest],
    ) -> VersionRecord:
        await asyncio.to_thread(self._hub.registry.check_target, upload.adapter_id, may_exist=upload.new_version)
        # Made here and not in a thread: a call cancelled on the way back from there would leave the folder behind.
        with ArtifactUpload(self._hub.store, files, self._max_upload_bytes) as received:
            async for request in requests:
                if request.WhichOneof("payload") != "chunk":
                    raise InvalidArgument(
                        "upload is accepted in the first message only", reason="UPLOAD_OUT_OF_ORDER", field="upload"
                    )
                check_chunk(request.chunk.data, "chunk.data")
                await run_to_end(received.write, request.chunk.name, request.chunk.data)
            folder = await run_to_end(received.finish)
            ends = await self._end_tokens(folder)
            info = await self._engine.inspect(str(folder), upload.strategy or None, received.content)
            return await run_to_end(
                self._hub.publish,
                folder,
                adapter_id=upload.adapter_id,
                info=info,
                base_fingerprint=self._engine.model.fingerprint,
                end_token_ids=ends,
                adapter_may_exist=upload.new_version,
                request=key,
                sha256=received.sha256,
            )

    async def _end_tokens(self, folder: Path) -> list[int]:
        """Tokens that end what the uploaded files write: by their manifest or configuration, and by a tokenizer and
        chat template of their own. Raises FailedPrecondition for a tokenizer that cannot be used."""
        text = await self._texts.read(folder)
        model = self._engine.model
        ends = await asyncio.to_thread(uploaded_end_tokens, folder, model.vocab_size, model.eos_token_ids)
        if text is None or text is self._texts.base:
            return ends
        with contextlib.suppress(GraftworkServerError):  # a template that fails or loops says no end; the rest works
            own = await self._texts.run(text, 0, lambda text: text.end_tokens(), "messages")
            ends = sorted({*ends, *own})
        return ends

    async def _load(self, version: VersionRecord) -> pb.LoadReport:
        begun = time.monotonic()
        resolved = self._hub.resolver.resolved(version)
        async with self._hub.leases.hold(resolved):
            await text_of(self._texts, resolved)
            report = await self._engine.load(self._hub.resolver.adapter_ref(version))
        return load_report_message(report, (time.monotonic() - begun) * 1000)

    async def _unload_unless_published(self, digest: str) -> None:
        """The same files may still be published under another name; then they stay where they are."""
        with contextlib.suppress(GraftworkServerError):
            if not await asyncio.to_thread(self._hub.registry.is_published, digest):
                await self._engine.unload(digest)
