"""What people do with adapter files after training: average, merge, extract, resize."""
