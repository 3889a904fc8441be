"""The coordinator: accepts, keeps, schedules and follows training jobs."""
