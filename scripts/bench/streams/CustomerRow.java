import java.nio.ByteBuffer;
import java.nio.ByteOrder;

/**
 * A customer's state as one row of doubles, of the size and with the windows that Headrace keeps for the standard
 * workload: tiles by event time, a head (the newest tile reached) for each window.
 */
final class CustomerRow {
    static final int SLOTS = 138;
    static final int BYTES = SLOTS * Double.BYTES;

    private static final long MINUTE = 60_000L;
    private static final long HOUR = 60 * MINUTE;
    private static final long DAY = 24 * HOUR;

    private static final int EVENTS = 1;
    private static final int FIRST_SEEN = 2;
    private static final int LAST_SEEN = 3;
    private static final int LAST_TRANSACTION = 4;
    /** Searches, transactions, sum and maximum of their amounts. */
    private static final Window LAST_HOUR = new Window(5, 5 * MINUTE, 12, 4);
    /** Carts. */
    private static final Window LAST_DAY = new Window(LAST_HOUR.end(), 2 * HOUR, 12, 1);
    /** Transactions, those that have an amount, sum and maximum. */
    private static final Window LAST_MONTH = new Window(LAST_DAY.end(), 2 * DAY, 15, 4);
    /** Score, time and version of each model's latest inference. */
    private static final int INFERENCES = LAST_MONTH.end();

    private static final double[] COEFFICIENTS = {0.3, 0.01, 0.0005, 0.001, 0.002, 0.001, 1e-6, 1e-3, 1e-3, -1e-5};

    private final ByteBuffer slots;

    CustomerRow(byte[] stored) {
        slots = ByteBuffer.wrap(stored == null ? new byte[BYTES] : stored).order(ByteOrder.LITTLE_ENDIAN);
    }

    byte[] bytes() {
        return slots.array();
    }

    private double get(int slot) {
        return slots.getDouble(slot * Double.BYTES);
    }

    private void set(int slot, double value) {
        slots.putDouble(slot * Double.BYTES, value);
    }

    private void add(int slot, double value) {
        set(slot, get(slot) + value);
    }

    /** Folds one event in and gives the ten features of the standard workload, as of it. */
    double[] fold(String type, long timeMs, double amount) {
        double sinceTransaction = get(LAST_TRANSACTION) == 0 ? 0 : (timeMs - get(LAST_TRANSACTION)) / 1000.0;
        add(EVENTS, 1);
        set(FIRST_SEEN, get(FIRST_SEEN) == 0 ? timeMs : Math.min(get(FIRST_SEEN), timeMs));
        set(LAST_SEEN, Math.max(get(LAST_SEEN), timeMs));
        int hour = LAST_HOUR.tile(this, timeMs);
        int day = LAST_DAY.tile(this, timeMs);
        int month = LAST_MONTH.tile(this, timeMs);
        switch (type) {
            case "search" -> addAt(hour, 0, 1);
            case "add_to_cart" -> addAt(day, 0, 1);
            default -> {
                transaction(hour, 1, 2, amount);
                transaction(month, 0, 2, amount);
                addAt(month, 1, 1);
                set(LAST_TRANSACTION, timeMs);
            }
        }
        double hourly = LAST_HOUR.sum(this, 1);
        double monthly = LAST_MONTH.sum(this, 0);
        double spentHourly = LAST_HOUR.sum(this, 2);
        double spentMonthly = LAST_MONTH.sum(this, 2);
        return new double[] {
            LAST_HOUR.sum(this, 0), LAST_DAY.sum(this, 0), monthly,
            spentHourly, hourly == 0 ? 0 : spentHourly / hourly, LAST_HOUR.max(this, 3),
            spentMonthly, monthly == 0 ? 0 : spentMonthly / monthly, LAST_MONTH.max(this, 3),
            sinceTransaction,
        };
    }

    /** A logistic regression's score, kept in the row as the latest inference of model number `model`. */
    double infer(int model, double[] features, long timeMs) {
        double score = -model;
        for (int place = 0; place < features.length; place++) {
            score += COEFFICIENTS[place] * features[place];
        }
        score = 1 / (1 + Math.exp(-score));
        set(INFERENCES + 3 * model, score);
        set(INFERENCES + 3 * model + 1, timeMs);
        set(INFERENCES + 3 * model + 2, 1);
        return score;
    }

    private void transaction(int tile, int count, int sum, double amount) {
        if (tile >= 0) {
            addAt(tile, count, 1);
            addAt(tile, sum, amount);
            set(tile + sum + 1, Math.max(get(tile + sum + 1), amount));
        }
    }

    private void addAt(int tile, int place, double value) {
        if (tile >= 0) {
            add(tile + place, value);
        }
    }

    /** A ring of `tiles` tiles of `planes` accumulators each, behind a head slot. */
    private record Window(int head, long widthMs, int tiles, int planes) {
        int end() {
            return head + 1 + tiles * planes;
        }

        /** First slot of the tile of that time, after the ring was moved on to it; -1 for a tile that is gone. */
        int tile(CustomerRow row, long timeMs) {
            long tile = timeMs / widthMs;
            long newest = (long) row.get(head);
            for (long next = Math.max(newest + 1, tile - tiles + 1); next <= tile; next++) {
                int first = slot(next);
                for (int plane = 0; plane < planes; plane++) {
                    row.set(first + plane, 0);
                }
            }
            row.set(head, Math.max(newest, tile));
            return tile > newest - tiles ? slot(tile) : -1;
        }

        private int slot(long tile) {
            return head + 1 + (int) (tile % tiles) * planes;
        }

        double sum(CustomerRow row, int plane) {
            double found = 0;
            for (int tile = 0; tile < tiles; tile++) {
                found += row.get(head + 1 + tile * planes + plane);
            }
            return found;
        }

        double max(CustomerRow row, int plane) {
            double found = 0;
            for (int tile = 0; tile < tiles; tile++) {
                found = Math.max(found, row.get(head + 1 + tile * planes + plane));
            }
            return found;
        }
    }
}
