"""What every command needs: options, the device, progress bars and Dask."""
