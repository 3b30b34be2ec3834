"""What `pipeline steer` asks, runs and shows."""
