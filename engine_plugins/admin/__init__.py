"""The authenticated admin contract (`/admin/v1`) that is the same on every engine."""
