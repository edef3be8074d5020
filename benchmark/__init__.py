"""What Attune is measured by, and independent implementations to compare it with; the pack itself never imports it."""
