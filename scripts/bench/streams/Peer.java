import java.io.FileInputStream;
import java.io.InputStream;
import java.time.Duration;
import java.util.Optional;
import java.util.Properties;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;
import java.util.zip.CRC32;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.LagInfo;
import org.apache.kafka.streams.TaskMetadata;
import org.apache.kafka.streams.ThreadMetadata;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.errors.StreamsException;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.processor.StateRestoreListener;
import org.apache.kafka.streams.state.Stores;

/**
 * One Kafka Streams instance that does the standard workload's job: `java Peer settings.properties`.
 *
 * Settings under "peer." are this program's (input, output, store, instance, report.ms), all others Kafka Streams'. With
 * "peer.costs" (such as "ads=0.002,fraud=0.005": event types and seconds) it calls models in a chain instead, and has no
 * store.
 * Each line of its output is a JSON object: the state, the partitions it works on (active) and stands by for, how many
 * changelog records these lack (lag, -1 while it is not known), records restored, and seconds from its start to its
 * first RUNNING (-1 before).
 */
public final class Peer {
    private static final AtomicLong RESTORED_RECORDS = new AtomicLong();
    private static final AtomicLong RUNNING_NS = new AtomicLong();

    public static void main(String[] arguments) throws Exception {
        Properties settings = new Properties();
        try (InputStream file = new FileInputStream(arguments[0])) {
            settings.load(file);
        }
        KafkaStreams streams = new KafkaStreams(topology(settings), settings);
        streams.setUncaughtExceptionHandler(failure -> {
            failure.printStackTrace();
            return StreamThreadExceptionResponse.REPLACE_THREAD;
        });
        streams.setGlobalStateRestoreListener(new CountRestored());
        CountDownLatch ended = new CountDownLatch(1);
        streams.setStateListener((now, before) -> {
            if (now == KafkaStreams.State.RUNNING) {
                RUNNING_NS.compareAndSet(0, System.nanoTime());
            }
            if (now == KafkaStreams.State.ERROR || now == KafkaStreams.State.NOT_RUNNING) {
                ended.countDown();
            }
        });
        Runtime.getRuntime().addShutdownHook(new Thread(() -> streams.close(Duration.ofSeconds(20))));
        long startedNs = System.nanoTime();
        streams.start();
        long everyMs = Long.parseLong(settings.getProperty("peer.report.ms", "500"));
        do {
            report(streams, startedNs);
        } while (!ended.await(everyMs, TimeUnit.MILLISECONDS));
    }

    private static Topology topology(Properties settings) {
        String store = settings.getProperty("peer.store");
        String instance = settings.getProperty("peer.instance");
        var bytes = Serdes.Bytes();
        var values = Serdes.ByteArray();
        Topology topology = new Topology();
        topology.addSource("events", bytes.deserializer(), values.deserializer(), settings.getProperty("peer.input"));
        String costs = settings.getProperty("peer.costs");
        if (costs != null) {
            topology.addProcessor("customers", () -> new ChainProcessor(costs), "events");
            topology.addSink("inferences", settings.getProperty("peer.output"), bytes.serializer(), values.serializer(),
                "customers");
            return topology;
        }
        topology.addProcessor("customers", () -> new CustomerProcessor(store, instance), "events");
        topology.addStateStore(
            Stores.keyValueStoreBuilder(Stores.persistentKeyValueStore(store), bytes, values), "customers");
        topology.addSink("inferences", settings.getProperty("peer.output"), bytes.serializer(), values.serializer(),
            (String topic, Bytes key, byte[] value, int partitions) -> Optional.of(Set.of(partition(key, partitions))),
            "customers");
        return topology;
    }

    /** As the events are: the inference of an event goes to the partition number that the event came from. */
    private static int partition(Bytes key, int partitions) {
        CRC32 sum = new CRC32();
        sum.update(key.get());
        return (int) (sum.getValue() % partitions);
    }

    /** From the main thread only: the lags take requests to the broker, which a stream thread must not wait for. */
    private static void report(KafkaStreams streams, long startedNs) {
        Set<Integer> active = new TreeSet<>();
        Set<Integer> standby = new TreeSet<>();
        long lag = -1;
        KafkaStreams.State state = streams.state();
        try {
            for (ThreadMetadata thread : streams.metadataForLocalThreads()) {
                thread.activeTasks().forEach(task -> active.add(partitionOf(task)));
                thread.standbyTasks().forEach(task -> standby.add(partitionOf(task)));
            }
            lag = streams.allLocalStorePartitionLags().values().stream()
                .flatMap(partitions -> partitions.values().stream()).mapToLong(LagInfo::offsetLag).sum();
        } catch (IllegalStateException | StreamsException notKnownNow) {
            lag = -1;
        }
        double runningS = RUNNING_NS.get() == 0 ? -1 : (RUNNING_NS.get() - startedNs) / 1e9;
        System.out.printf(
            "{\"state\":\"%s\",\"active\":%s,\"standby\":%s,\"lag\":%d,\"restored\":%d,\"running_s\":%.3f}%n",
            state, active, standby, lag, RESTORED_RECORDS.get(), runningS);
        System.out.flush();
    }

    private static int partitionOf(TaskMetadata task) {
        return task.taskId().partition();
    }

    private static final class CountRestored implements StateRestoreListener {
        @Override
        public void onRestoreStart(TopicPartition partition, String store, long start, long end) { }

        @Override
        public void onBatchRestored(TopicPartition partition, String store, long end, long count) {
            RESTORED_RECORDS.addAndGet(count);
        }

        @Override
        public void onRestoreEnd(TopicPartition partition, String store, long total) { }
    }
}
