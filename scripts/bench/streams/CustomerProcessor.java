import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonToken;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.processor.api.RecordMetadata;
import org.apache.kafka.streams.state.KeyValueStore;

/** Folds each event into its customer's row and sends on one record for each model that the event triggers. */
final class CustomerProcessor implements Processor<Bytes, byte[], Bytes, byte[]> {
    private static final JsonFactory JSON = new JsonFactory();
    private static final String[] MODELS = {"ads/bid", "offers/coupon", "fraud/abuse"};

    private final String store;
    private final String instance;
    private ProcessorContext<Bytes, byte[]> context;
    private KeyValueStore<Bytes, byte[]> rows;

    CustomerProcessor(String store, String instance) {
        this.store = store;
        this.instance = instance;
    }

    @Override
    public void init(ProcessorContext<Bytes, byte[]> context) {
        this.context = context;
        rows = context.getStateStore(store);
    }

    @Override
    public void process(Record<Bytes, byte[]> record) {
        String type = "";
        long timeMs = record.timestamp();
        double amount = 0;
        try (JsonParser parser = JSON.createParser(record.value())) {
            while (parser.nextToken() != null) {
                if (parser.currentToken() == JsonToken.FIELD_NAME) {
                    String name = parser.currentName();
                    parser.nextToken();
                    switch (name) {
                        case "type" -> type = parser.getText();
                        case "time" -> timeMs = parser.getLongValue();
                        case "amount" -> amount = parser.getDoubleValue();
                        default -> { }
                    }
                }
            }
        } catch (IOException failure) {
            throw new UncheckedIOException(failure);
        }
        CustomerRow row = new CustomerRow(rows.get(record.key()));
        double[] features = row.fold(type, timeMs, amount);
        switch (type) {
            case "add_to_cart" -> infer(0, row, features, timeMs, record);
            case "transaction" -> {
                infer(1, row, features, timeMs, record);
                infer(2, row, features, timeMs, record);
            }
            default -> { }
        }
        rows.put(record.key(), row.bytes());
    }

    private void infer(int model, CustomerRow row, double[] features, long timeMs, Record<Bytes, byte[]> record) {
        double score = row.infer(model, features, timeMs);
        RecordMetadata source = context.recordMetadata().orElseThrow();
        String inference = "{\"model\":\"" + MODELS[model] + "\",\"customer\":\"" + record.key()
            + "\",\"partition\":" + source.partition() + ",\"offset\":" + source.offset() + ",\"time\":" + timeMs
            + ",\"outputs\":{\"score\":" + score + "},\"instance\":\"" + instance + "\"}";
        context.forward(record.withValue(inference.getBytes(StandardCharsets.UTF_8)));
    }
}
