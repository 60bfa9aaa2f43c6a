"""The engine: owns the base weights, the KV cache, the adapter slots and the step loop. Imports no gRPC, protobuf,
pluggy or database, and nothing heavier than the standard library at this level, so that the front can import
`engine.client` without torch."""
