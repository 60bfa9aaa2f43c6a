"""The engine: step loop, adapters on the device, the process around them. Imports no gRPC, pluggy or database."""
