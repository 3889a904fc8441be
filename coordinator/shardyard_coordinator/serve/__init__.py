"""The gRPC face: servicers, wire conversion, interceptors, fan-out."""
