"""From conversations to padded, masked batches."""
