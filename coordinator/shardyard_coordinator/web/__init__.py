"""JSON over HTTP: every call of the gRPC services, for clients that have no gRPC."""
