"""The store: transactions, the event log, migrations. The truth of the service."""
