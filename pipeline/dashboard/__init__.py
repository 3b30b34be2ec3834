"""What `pipeline dashboard` writes: the site's own files, its packed data, and pages for blind comparisons."""
