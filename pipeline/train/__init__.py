"""What training stages share: runs side by side, their rows, starts and scores."""
