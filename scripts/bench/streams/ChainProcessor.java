import java.lang.management.ManagementFactory;
import java.lang.management.ThreadMXBean;
import java.nio.charset.StandardCharsets;
import java.util.LinkedHashMap;
import java.util.Map;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.processor.api.RecordMetadata;

/**
 * Calls every tenant's model that an event concerns, one after another, and sends on one record for each. A model is as
 * much CPU time of this thread as the real one takes for a row in a batch: no call costs anything on top.
 */
final class ChainProcessor implements Processor<Bytes, byte[], Bytes, byte[]> {
    private static final ThreadMXBean THREADS = ManagementFactory.getThreadMXBean();

    private final Map<String, Long> costsNs = new LinkedHashMap<>();
    private ProcessorContext<Bytes, byte[]> context;

    /** Costs are "type=seconds", joined by commas. */
    ChainProcessor(String costs) {
        for (String cost : costs.split(",")) {
            String[] parts = cost.split("=");
            costsNs.put("\"type\":\"" + parts[0] + "\"", (long) (Double.parseDouble(parts[1]) * 1e9));
        }
    }

    @Override
    public void init(ProcessorContext<Bytes, byte[]> context) {
        this.context = context;
    }

    @Override
    public void process(Record<Bytes, byte[]> record) {
        String event = new String(record.value(), StandardCharsets.UTF_8);
        RecordMetadata source = context.recordMetadata().orElseThrow();
        costsNs.forEach((type, costNs) -> {
            if (event.contains(type)) {
                long until = THREADS.getCurrentThreadCpuTime() + costNs;
                while (THREADS.getCurrentThreadCpuTime() < until) {
                    Thread.onSpinWait();
                }
                String inference = "{" + type + ",\"partition\":" + source.partition() + ",\"offset\":" + source.offset()
                    + ",\"outputs\":{\"score\":0.5}}";
                context.forward(record.withValue(inference.getBytes(StandardCharsets.UTF_8)));
            }
        });
    }
}
