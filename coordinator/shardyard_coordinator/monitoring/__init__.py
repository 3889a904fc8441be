"""What operators see of the service: metrics, the lines of its log, and traces (docs/monitoring.md)."""
