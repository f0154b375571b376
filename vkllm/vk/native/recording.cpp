#include "recording.hpp"

#include <stdexcept>

#include "kompute/operations/OpBase.hpp"

namespace vkllm {

namespace {

/// An operation of ours: all work happens at record time.
template<typename F>
class Op final : public kp::OpBase
{
  public:
    explicit Op(F record)
      : m_record(std::move(record))
    {}
    void record(const vk::CommandBuffer& commands) override { m_record(static_cast<VkCommandBuffer>(commands)); }
    void preEval(const vk::CommandBuffer&) override {}
    void postEval(const vk::CommandBuffer&) override {}

  private:
    F m_record;
};

template<typename F>
std::shared_ptr<kp::OpBase>
op(F record)
{
    return std::make_shared<Op<F>>(std::move(record));
}

constexpr VkPipelineStageFlags WORK = VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT;
constexpr VkAccessFlags WRITES = VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT;
constexpr VkAccessFlags USES = WRITES | VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_TRANSFER_READ_BIT;

void
memory_barrier(VkCommandBuffer commands)
{
    const VkMemoryBarrier b{ VK_STRUCTURE_TYPE_MEMORY_BARRIER, nullptr, WRITES, USES | VK_ACCESS_HOST_READ_BIT };
    dispatch().vkCmdPipelineBarrier(commands, WORK, WORK | VK_PIPELINE_STAGE_HOST_BIT, 0, 1, &b, 0, nullptr, 0, nullptr);
}

constexpr uint32_t SETS_A_POOL = 64;
constexpr uint32_t DESCRIPTORS_A_POOL = 512;
constexpr VkDescriptorType TYPES[] = { VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, VK_DESCRIPTOR_TYPE_STORAGE_TEXEL_BUFFER, VK_DESCRIPTOR_TYPE_UNIFORM_TEXEL_BUFFER };

} // namespace

Recording::Recording(std::shared_ptr<Device> device, uint32_t timestamps)
  : m_device(std::move(device))
  , m_query_capacity(timestamps)
{
    guarded([&] {
        m_device->manager->clear(); // forget sequences that are gone
        m_sequence = m_device->manager->sequence();
    });
    guarded([&] { m_sequence->begin(); });
    if (timestamps)
        guarded([&] {
            VkQueryPoolCreateInfo info{ VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO };
            info.queryType = VK_QUERY_TYPE_TIMESTAMP;
            info.queryCount = timestamps;
            vkllm::dispatch().vkCreateQueryPool(m_device->handle, &info, nullptr, &m_queries); // last: nothing below fails
        });
    m_sequence->record(op([queries = m_queries, timestamps](VkCommandBuffer c) {
        if (timestamps)
            vkllm::dispatch().vkCmdResetQueryPool(c, queries, 0, timestamps);
        memory_barrier(c); // what earlier submits wrote
    }));
}

Recording::~Recording()
{
    const auto& vk = vkllm::dispatch();
    const Guard guard;
    if (running()) { // never free what the device may still use: a hung device keeps its objects
        bool done = false;
        try {
            done = wait(10'000'000'000ull);
        } catch (const std::exception&) {
            done = true; // lost: nothing runs any more
        }
        if (!done) {
            new std::shared_ptr<kp::Sequence>(m_sequence);
            new std::set<std::shared_ptr<Buffer>>(m_buffers);
            new std::set<std::shared_ptr<Pipeline>>(m_pipelines);
            return;
        }
    }
    m_sequence.reset();
    for (VkDescriptorPool pool : m_pools)
        vk.vkDestroyDescriptorPool(m_device->handle, pool, nullptr);
    vk.vkDestroyQueryPool(m_device->handle, m_queries, nullptr);
}

VkDescriptorSet
Recording::allocate_set(const Pipeline& pipeline)
{
    std::map<VkDescriptorType, uint32_t> needs;
    for (VkDescriptorType t : pipeline.types)
        needs[t]++;
    bool fits = m_sets_left > 0;
    for (const auto& [type, n] : needs)
        fits = fits && m_descriptors_left[type] >= n;
    if (!fits) {
        std::vector<VkDescriptorPoolSize> sizes;
        for (VkDescriptorType t : TYPES)
            sizes.push_back({ t, DESCRIPTORS_A_POOL });
        VkDescriptorPoolCreateInfo info{ VK_STRUCTURE_TYPE_DESCRIPTOR_POOL_CREATE_INFO };
        info.maxSets = SETS_A_POOL;
        info.poolSizeCount = static_cast<uint32_t>(sizes.size());
        info.pPoolSizes = sizes.data();
        VkDescriptorPool pool = VK_NULL_HANDLE;
        vkllm::dispatch().vkCreateDescriptorPool(m_device->handle, &info, nullptr, &pool);
        Guard::check();
        m_pools.push_back(pool);
        m_sets_left = SETS_A_POOL;
        for (VkDescriptorType t : TYPES)
            m_descriptors_left[t] = DESCRIPTORS_A_POOL;
    }
    VkDescriptorSetAllocateInfo info{ VK_STRUCTURE_TYPE_DESCRIPTOR_SET_ALLOCATE_INFO };
    info.descriptorPool = m_pools.back();
    info.descriptorSetCount = 1;
    info.pSetLayouts = &pipeline.set_layout;
    VkDescriptorSet set = VK_NULL_HANDLE;
    vkllm::dispatch().vkAllocateDescriptorSets(m_device->handle, &info, &set);
    Guard::check();
    m_sets_left--;
    for (const auto& [type, n] : needs)
        m_descriptors_left[type] -= n;
    return set;
}

void
Recording::dispatch(std::shared_ptr<Pipeline> pipeline, const std::vector<BoundRange>& ranges, std::array<uint32_t, 3> groups, const std::string& push)
{
    if (m_finished)
        throw std::invalid_argument("the recording is finished");
    if (ranges.size() != pipeline->types.size() || push.size() != pipeline->push_bytes || ranges.size() > DESCRIPTORS_A_POOL)
        throw std::invalid_argument("bindings or push constants do not fit the pipeline");
    const Guard guard;
    const VkDescriptorSet set = allocate_set(*pipeline);
    std::vector<VkDescriptorBufferInfo> buffers(ranges.size());
    std::vector<VkBufferView> views(ranges.size());
    std::vector<VkWriteDescriptorSet> writes;
    for (uint32_t i = 0; i < ranges.size(); i++) {
        const auto& r = ranges[i];
        VkWriteDescriptorSet w{ VK_STRUCTURE_TYPE_WRITE_DESCRIPTOR_SET };
        w.dstSet = set;
        w.dstBinding = i;
        w.descriptorCount = 1;
        w.descriptorType = pipeline->types[i];
        if (w.descriptorType == VK_DESCRIPTOR_TYPE_STORAGE_BUFFER) {
            buffers[i] = { r.buffer->handle, r.offset, r.nbytes };
            w.pBufferInfo = &buffers[i];
        } else {
            views[i] = r.buffer->texel_view(r.format, r.offset, r.nbytes);
            w.pTexelBufferView = &views[i];
        }
        writes.push_back(w);
        m_buffers.insert(r.buffer);
    }
    vkllm::dispatch().vkUpdateDescriptorSets(m_device->handle, static_cast<uint32_t>(writes.size()), writes.data(), 0, nullptr);
    m_pipelines.insert(pipeline);
    m_sequence->record(op([p = pipeline.get(), set, groups, push](VkCommandBuffer c) {
        const auto& vk = vkllm::dispatch();
        vk.vkCmdBindPipeline(c, VK_PIPELINE_BIND_POINT_COMPUTE, p->handle);
        vk.vkCmdBindDescriptorSets(c, VK_PIPELINE_BIND_POINT_COMPUTE, p->layout, 0, 1, &set, 0, nullptr);
        if (!push.empty())
            vk.vkCmdPushConstants(c, p->layout, VK_SHADER_STAGE_COMPUTE_BIT, 0, static_cast<uint32_t>(push.size()), push.data());
        vk.vkCmdDispatch(c, groups[0], groups[1], groups[2]);
    }));
    Guard::check();
}

void
Recording::barrier()
{
    if (m_finished)
        throw std::invalid_argument("the recording is finished");
    m_sequence->record(op(memory_barrier));
}

void
Recording::copy(std::shared_ptr<Buffer> src, std::shared_ptr<Buffer> dst, uint64_t nbytes, uint64_t src_offset, uint64_t dst_offset)
{
    if (m_finished)
        throw std::invalid_argument("the recording is finished");
    m_buffers.insert(src);
    m_buffers.insert(dst);
    const VkBufferCopy region{ src_offset, dst_offset, nbytes };
    m_sequence->record(op([from = src->handle, to = dst->handle, region](VkCommandBuffer c) { vkllm::dispatch().vkCmdCopyBuffer(c, from, to, 1, &region); }));
}

uint32_t
Recording::timestamp()
{
    if (m_finished || m_query_count == m_query_capacity)
        throw std::invalid_argument("no timestamp is left in this recording");
    m_sequence->record(op([queries = m_queries, n = m_query_count](VkCommandBuffer c) {
        vkllm::dispatch().vkCmdWriteTimestamp(c, VK_PIPELINE_STAGE_ALL_COMMANDS_BIT, queries, n);
    }));
    return m_query_count++;
}

void
Recording::finish()
{
    if (m_finished)
        return;
    m_finished = true; // also when it fails: a command buffer that could not be ended is of no use
    guarded([&] {
        m_sequence->record(op(memory_barrier)); // results to the host
        m_sequence->end();
    });
    m_ended = true;
}

void
Recording::submit()
{
    if (running())
        throw std::invalid_argument("the recording is still running; wait for it first");
    finish();
    if (!m_ended)
        throw std::invalid_argument("recording failed; record it again");
    const std::lock_guard lock(m_device->queue_mutex);
    guarded([&] {
        t_created.fence = VK_NULL_HANDLE;
        try {
            m_sequence->evalAsync();
        } catch (const vk::SystemError&) { // vkCreateFence; t_failure has it
        }
        m_fence = t_created.fence;
        if (t_failure.result != VK_SUCCESS)
            m_sequence->evalAwait(0); // nothing runs: resets Kompute's state and destroys the fence; vkWaitForFences does nothing
    });
}

bool
Recording::wait(uint64_t timeout_ns)
{
    if (!running())
        return true;
    bool done = false;
    guarded([&] {
        // kp::Sequence::evalAwait destroys its fence even when it times out, under the driver's feet: wait before it.
        t_created.fence = m_fence;
        done = vkllm::dispatch().vkWaitForFences(m_device->handle, 1, &m_fence, VK_TRUE, timeout_ns) != VK_TIMEOUT;
        if (done)
            m_sequence->evalAwait(0);
    });
    return done;
}

std::vector<uint64_t>
Recording::timestamps() const
{
    std::vector<uint64_t> ticks(m_query_count);
    if (ticks.empty())
        return ticks;
    const Guard guard;
    vkllm::dispatch().vkGetQueryPoolResults(m_device->handle, m_queries, 0, m_query_count, ticks.size() * 8, ticks.data(), 8, VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT);
    Guard::check();
    return ticks;
}

} // namespace vkllm
