"""What one GPU must show; skipped where there is none."""
